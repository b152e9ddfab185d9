"""What transformers computes of a family's checkpoint, and how often its module calls what.

No pass is asked: attentions and norms are counted by what the module calls in one forward pass,
rotary embeddings by what the family's row says of its config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from matrix_families import Family

if TYPE_CHECKING:
    from llmopt.frontend.reference import ModuleReference
    from llmopt.ir.program import Program

_OURS: Final = ("past_key", "past_value", "logits_to_keep")


@dataclass(frozen=True)
class Oracle:
    """The module of transformers that a checkpoint belongs to.

    Args:
        reference: It, as a source of the checkpoint's Program.
        expected: How many attentions, norms and rotary embeddings it has, attentions of a decoder
            to what an encoder read among them.
    """

    reference: ModuleReference
    expected: Mapping[str, int]

    @classmethod
    def open(cls, folder: Path, family: Family, program: Program) -> Self:
        """Return it for a checkpoint.

        Args:
            folder: The checkpoint.
            family: What it is of.
            program: What inputs and outputs mean.
        """
        import torch
        import transformers

        from llmopt.frontend.census import census
        from llmopt.ir.components import source_feeds
        from llmopt.ir.feeds import Case, feeds

        auto: Any = getattr(transformers, family.auto)
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        first, *others = program.signatures.values()
        if others:
            reference = rewriting(model, [p.name for p in first.inputs])
        else:
            inputs = [p.name for p in first.inputs if p.role not in _OURS]
            outputs = [p.name for p in first.outputs if not p.name.startswith("present.")]
            reference = reading(model, inputs, outputs)
        case = Case(1, 7)
        batch = feeds(program.signature, case, program.facts.model.vocabulary or 2)
        batch |= source_feeds(program, case)
        expected = census(model, lambda: list(reference.run([batch])))
        attentions = expected.get("attention", 0)
        rotary = attentions if family.rotary is None else family.rotary
        return cls(reference, {**expected, "rotary": rotary})


def reading(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> ModuleReference:
    """Return a module that takes and gives what its Program does, as a reference.

    Args:
        model: The module.
        inputs: What it takes.
        outputs: What is taken of what it gives.
    """
    from llmopt.frontend.reference import ModuleReference

    def run(**given: Any) -> list[Any]:
        found = model(**given)
        return [found[name] for name in outputs]

    return ModuleReference(run, inputs, outputs, positional=0)


def rewriting(model: Any, read: Sequence[str]) -> ModuleReference:
    """Return a module that reads one sequence and writes another, as a reference.

    It is run row by row, what is written without its padding: a decoder of transformers counts
    positions from the first column, be it padding or not. What is read keeps its padding.

    Args:
        model: The module.
        read: What its encoder takes.
    """
    import torch

    from llmopt.frontend.reference import ModuleReference
    from llmopt.ir.components import FIRST

    def run(**given: Any) -> list[Any]:
        tokens, real = given["input_ids"], given["attention_mask"] == 1
        rows = []
        for row, here in enumerate(real):
            source = {name: given[FIRST + name][row, None] for name in read}
            written = tokens[row, here][None]
            rows.append(model(**source, decoder_input_ids=written, use_cache=False))
        logits = torch.zeros(*real.shape, rows[0].logits.shape[-1])
        logits[real] = torch.cat([found.logits[0] for found in rows])
        return [torch.cat([found.encoder_last_hidden_state for found in rows]), logits]

    inputs = [*(FIRST + name for name in read), "input_ids", "attention_mask"]
    return ModuleReference(run, inputs, ["last_hidden_state", "logits"], positional=0)
