"""What mkdocs does besides its own: pages and tables that are made from the objects."""

from __future__ import annotations

import re
from typing import Any

import docs_outside
import docs_reference
import docs_tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

TABLE = re.compile(r"<!-- table: (\w+) -->.*?<!-- end -->", re.S)
TABLES = {
    **docs_tables.TABLES,
    "names": docs_reference.facade_table,
    "modules": lambda: docs_reference.module_table(docs_reference.modules()),
}
"""What stands in the place of `<!-- table: name --> ... <!-- end -->`."""
ADDED = {"Reference": docs_reference.nav, "Examples": docs_outside.nav}
"""What is added to a part of the navigation."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that are made go into the navigation."""
    for entry in config.nav or []:
        for title, pages in entry.items():
            if title in ADDED:
                pages += ADDED[title]()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of modules, and of files outside of `docs/`."""
    elsewhere = docs_reference.names_from_elsewhere()
    made = docs_outside.pages()
    for module in docs_reference.modules():
        names = elsewhere.get(module.name, {})
        made[module.page] = docs_reference.module_page(module, names)
    for place, markdown in made.items():
        files.append(File.generated(config, place, content=markdown))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Tables are filled in, and links lead to pages."""
    filled = TABLE.sub(lambda match: TABLES[match[1]](), markdown)
    is_made = page.file.src_uri.startswith(docs_reference.FOLDER + "/")
    return filled if is_made else docs_outside.with_links(filled, page.file.src_uri)
