"""Results made up for the tests of tables and pictures."""

from benchmarks.results import DECODE, CaseInfo, Results, Row
from benchmarks.settings import Setting

CASES = (
    CaseInfo("causal/favor-chunked", "FAVOR+ (chunked)", "causal", ours=True),
    CaseInfo("causal/per-token", "FAVOR+ (scan over tokens)", "causal"),
    CaseInfo("causal/exact", "exact (jax.nn)", "causal"),
    CaseInfo("identity", "identity (v x 1)"),
    CaseInfo("decode/scan", "state, within a scan", ours=True),
)


def made_up(head_dims=(64,), platform="cpu") -> Results:
    """Ours takes T us, the scan 5 T us, exact attention T^2 / 1000 us and is not run at 4096."""
    seconds = {
        "causal/favor-chunked": lambda n: n * 1e-6,
        "causal/per-token": lambda n: 5e-6 * n,
        "causal/exact": lambda n: n * n * 1e-9,
        "identity": lambda n: 1e-8 * n,
    }
    rows = []
    for head_dim in head_dims:
        for length in (512, 2048, 4096):
            setting = Setting(length=length, head_dim=head_dim)
            for name, time in seconds.items():
                for measure in ("forward", "f+b"):
                    middle = time(length)
                    samples, reason = (0.9 * middle, middle, 1.3 * middle), None
                    if (name, length) == ("causal/exact", 4096):
                        samples, reason = (), "3 calls take longer than 5 s"
                    memory = 2 * setting.tensor_bytes
                    rows.append(Row(name, measure, setting, samples, memory, reason))
        for past in (0, 100_000):
            setting = Setting(length=past, head_dim=head_dim)
            rows.append(Row("decode/scan", DECODE, setting, (2e-5, 2.5e-5, 3e-5)))
    machine = {"command": "c", "date": "d", "platform": platform, "device": "v", "cpu": "p"}
    return Results(machine, CASES, tuple(rows))
