"""Writes files as ``torch.save`` does, without PyTorch, for tests of the reader."""

import io
import pickle
import zipfile

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


class Name:
    """A name in the pickle: a class or function of some module."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Called:
    """A call of a name."""

    def __init__(self, function, arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state


class Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


class Pickler(pickle._Pickler):
    """Python's own pickler, which also writes `Name`, `Called` and storages."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Called):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        elif isinstance(obj, Storage):
            kind = Name("torch", STORAGES[obj.array.dtype.name])
            super().save(("storage", kind, obj.key, "cpu", obj.array.size), False)
            self.write(pickle.BINPERSID)
        else:
            super().save(obj, save_persistent_id)


def tensor(key, array, shape=None, stride=None, offset=0):
    """A tensor over the storage ``array``, contiguous unless said otherwise."""
    shape = array.shape if shape is None else shape
    stride = tuple(np.cumprod((1, *shape[:0:-1]))[::-1].tolist()) if stride is None else stride
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    hooks = Called(Name("collections", "OrderedDict"), ())
    storage = Storage(key, array.reshape(-1))
    return Called(rebuild, (storage, offset, shape, stride, False, hooks))


def save(path, value, storages, compression=zipfile.ZIP_STORED):
    """Writes a value that holds `tensor` objects; ``storages`` has their numbers by key."""
    text = io.BytesIO()
    Pickler(text, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


def save_arrays(path, arrays, wrap=lambda tensors: tensors):
    """Writes arrays by name; ``wrap`` makes the value from the tensors by name."""
    keys = {name: str(index) for index, name in enumerate(arrays)}
    tensors = {name: tensor(keys[name], array) for name, array in arrays.items()}
    save(path, wrap(tensors), {keys[name]: array for name, array in arrays.items()})
