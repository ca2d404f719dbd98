"""What mkdocs does besides its own: pages and tables that are made from the objects."""

from __future__ import annotations

import re
from typing import Any

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


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The modules' pages go into the navigation, under Reference."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"] += docs_reference.nav()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The modules' pages."""
    elsewhere = docs_reference.names_from_elsewhere()
    for module in docs_reference.modules():
        page = docs_reference.module_page(module, elsewhere.get(module.name, {}))
        files.append(File.generated(config, module.page, content=page))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Tables are filled in."""
    return TABLE.sub(lambda match: TABLES[match[1]](), markdown)
