"""Tutorials as notebooks, converted from the Markdown pages.

MkDocs calls `on_files` and `on_page_markdown` (``hooks`` in mkdocs.yml).
"""

import re
from pathlib import Path

import jupytext

FOLDER = "tutorials/"
PAGES = "https://github.com/fast-attention/fast-attention/blob/main/docs/"


def notebook(page: Path):
    """Returns the page as a notebook; Python blocks and shell blocks become cells."""
    found = jupytext.read(page)
    found.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
    }
    for number, cell in enumerate(found.cells):
        # Equal pages give equal notebooks.
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            # The cell fails with the first command that fails, not only with the last.
            cell.source = re.sub(r"^%%(sh|bash)$", "%%bash -e", cell.source, flags=re.M)
        else:
            # The other pages do not lie beside a notebook that was downloaded.
            cell.source = cell.source.replace("](../", f"]({PAGES}")
    return found


def on_files(files, config):
    """Adds a notebook for each page of the tutorials."""
    # The tests convert pages without MkDocs.
    from mkdocs.structure.files import File

    for file in files.documentation_pages():
        if file.src_uri.startswith(FOLDER):
            content = jupytext.writes(notebook(Path(file.abs_src_path)), fmt="ipynb")
            files.append(File.generated(config, file.src_uri[:-3] + ".ipynb", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links the notebook below the title of its page."""
    if not page.file.src_uri.startswith(FOLDER):
        return markdown
    title, _, rest = markdown.partition("\n")
    link = Path(page.file.src_uri).with_suffix(".ipynb").name
    return f"{title}\n\n[Download this page as a notebook]({link}){{ download }}\n{rest}"
