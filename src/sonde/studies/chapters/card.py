"""What is this model, and does it do what its parts are called? Architecture, sites and the self-check."""

from collections import Counter

from sonde.runs.blocks import Chapter, Column, Table
from sonde.studies.chapters.part import Part

_SITES = {
    "embed": "what the token embedding returns",
    "resid_pre": "the residual stream that a block receives",
    "mixer_in": "what attention or recurrence is given: the output of the norm before it",
    "mixer_out": "what attention or recurrence adds to the stream",
    "mlp_in": "what the MLP is given",
    "mlp_out": "what the MLP adds to the stream",
    "resid_post": "the residual stream that a block leaves",
    "state": "recurrent state, convolution window or keys and values, in the cache",
    "logits": "the prediction",
}


_MODES = {"chunk": "yes", "step": "yes, one token at a time", "none": "no"}


class Card(Part):
    """Architecture, sites and self-check of the model."""

    name = "card"

    def write(self) -> Chapter:
        """Tables from the configuration and the self-check; no text is read."""
        lm, check = self.audit.lm, self.audit.lm.check()
        kinds = Counter(site.partition(".")[0] for site in lm.sites)
        refused = "; ".join(check.refusals)
        passed = f"it was measured and cannot be used for {refused}" if refused else "every check of its parts holds"
        return Chapter(
            id=self.name,
            question="What is this model, and do its parts do what they are called?",
            answer=(
                f"{lm.name} is a {lm.family} model of {lm.n_parameters:,} parameters in {lm.n_layers} blocks; {passed}."
            ),
            blocks=[
                Table(id="card.model", caption="The model", columns=["property", "value"], rows=self._facts()),
                Table(
                    id="card.check",
                    caption="Self-check on random tokens: the largest errors, relative to the numbers compared",
                    columns=["what must hold", "error", "allowed", "holds"],
                    rows=check.table(),
                ),
                Table(
                    id="card.sites",
                    caption="Sites that can be read and edited, from the shallowest to the deepest",
                    columns=["site", Column(name="number", digits=6), "what it is"],
                    rows=[[kind, kinds[kind], _SITES[kind]] for kind in _SITES if kinds[kind]],
                ),
            ],
            not_shown=(
                "The self-check runs a few random tokens: it shows that activations are read where they should be, "
                "not that the model is any good."
            ),
            how=(
                "Blocks, norms and unembedding are found by structure. The check compares the unembedding of the last "
                "block with the logits, each block's output with the next one's input, a run that is split by the "
                "cache with the whole run, and an edited copy of a state with the original."
            ),
        )

    def _facts(self) -> list[list[str]]:
        lm = self.audit.lm
        tokenizer = "none" if lm.tokenizer is None else f"{type(lm.tokenizer).__name__}, {len(lm.tokenizer):,} entries"
        return [
            ["architecture", f"{lm.family} ({type(lm.model).__name__})"],
            ["parameters", f"{lm.n_parameters:,}"],
            ["blocks", str(lm.n_layers)],
            ["width of the residual stream", str(lm.d_model)],
            ["vocabulary", f"{lm.vocab_size:,}"],
            ["longest context", "not limited" if lm.max_positions is None else f"{lm.max_positions:,} tokens"],
            ["tokenizer", tokenizer],
            ["computed in", f"{str(lm.dtype).removeprefix('torch.')} on {lm.device}"],
            ["continues from its cache", _MODES[lm.check().continuation.mode]],
            ["weights (SHA-256)", lm.hash[:16] + "…"],
        ]
