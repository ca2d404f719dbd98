"""What the masks were inside of a context that has put them back: for warnings only.

In auto-circuit the masks stayed as `patch_mode` and `train_mask_mode` left them, and code
that reads them after the context, or patches again without naming edges, relied on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Parameter


class MasksPutBackWarning(UserWarning):
    """Masks are read, or used, that a context had changed and has put back."""


@dataclass(frozen=True, eq=False)
class MasksPutBack:
    """The masks that a context has put back, and where it had changed them.

    context: its name. values: what they are again. changed: True where they were not that
    inside. Both by destination module.
    """

    context: str
    values: Mapping[str, Float[Tensor, "..."]]
    changed: Mapping[str, Bool[Tensor, "..."]]

    def is_visible(self, masks: Mapping[str, Parameter]) -> bool:
        """Does anybody who looks at the masks see something else than was inside?

        Not where the masks have been set since.
        """
        return any(
            bool((masks[name].data.to(value) == value)[self.changed[name]].any())
            for name, value in self.values.items()
            if masks[name].shape == value.shape
        )

    def explanation(self, instead: str) -> str:
        """Why the masks are not what somebody who knows auto-circuit expects."""
        return (
            f"The masks are again what they were before `{self.context}`, which has put them "
            f"back (in auto-circuit they stayed as they were inside). {instead}"
        )


def masks_put_back(
    context: str,
    before: Mapping[str, Float[Tensor, "..."]],
    inside: Mapping[str, Float[Tensor, "..."]],
) -> MasksPutBack | None:
    """None if the context had changed nothing."""
    changed = {
        name: before[name] != mask
        for name, mask in inside.items()
        if mask.shape == before[name].shape
    }
    changed = {name: where for name, where in changed.items() if bool(where.any())}
    if not changed:
        return None
    return MasksPutBack(context, {name: before[name] for name in changed}, changed)
