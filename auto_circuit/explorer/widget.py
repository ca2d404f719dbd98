"""The explorer as a notebook's widget. The only module that imports anywidget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anywidget
import traitlets

from auto_circuit.explorer.data import TaskView
from auto_circuit.explorer.packing import packed
from auto_circuit.explorer.page import BUILT


class _ExplorerWidget(anywidget.AnyWidget):
    """Hands the data to the same JavaScript that a page has."""

    _esm = BUILT
    data = traitlets.Unicode("").tag(sync=True)


def explorer_widget(views: Sequence[TaskView]) -> Any:
    """The widget that shows some tasks."""
    return _ExplorerWidget(data=packed(views))
