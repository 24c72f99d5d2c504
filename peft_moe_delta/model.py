"""`MoeDeltaModel`: an upcycled model with the verbs of its life, from the first stage of training to the graft.

In: what `get_peft_model(model, MoeDeltaConfig(...))` makes of a causal LM. Out: the same model in another stage, with
more languages or tokens, or grafted. Each verb is a function of the module that knows how; this stands above them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from .graft.memory import graft, merge_and_graft
from .tuner import MoeDeltaTuner
from .tuner.growing import StartFrom, add_languages, remove_group
from .tuner.initialisation import Source, load_experts
from .tuner.processes import check_whole, keep_findable
from .vocabulary.extend import add_tokens

GRAFT = "peft-moe-delta graft BASE POST_TRAINED adapter OUTPUT"


class MoeDeltaModel(MoeDeltaTuner):
    """Language-routed experts in place of MLP blocks. Made by `get_peft_model(model, MoeDeltaConfig(...))`.

    Untrained experts are copies, so the upcycled model computes what the base model computes.

    Raises:
        ArchitectureError: no MLP block to replace, weights that are offloaded, or quantised ones for full experts.
        PlanError: expert counts that do not fit the model's layers.
        CheckpointError: a loaded adapter that was made for another base model.
    """

    def start_expansion(
        self,
        *,
        routing: str | None = None,
        load_balancing_coef: float | None = None,
        language_prior_coef: float | None = None,
        language_prior_groups: list[str] | None = None,
        classifier_coef: float | None = None,
        train_earlier_rows: bool = False,
    ) -> None:
        """Train experts and routers on new-language text (MoE-LPR, stage 1).

        Args:
            routing: None keeps the routing in force.
            load_balancing_coef: None for 0.01.
            language_prior_coef: None for 0. DMoE classifies every group with 1.28.
            language_prior_groups: None for every group.
            classifier_coef: None for 0.
            train_earlier_rows: for an adapter that has grown, as in `start_review`.
        """
        self._start_stage(
            stage="expansion",
            routing=routing,
            load_balancing_coef=load_balancing_coef,
            language_prior_coef=language_prior_coef,
            language_prior_groups=language_prior_groups,
            classifier_coef=classifier_coef,
            train_earlier_rows=train_earlier_rows,
        )

    def start_review(
        self,
        *,
        routing: str | None = None,
        load_balancing_coef: float | None = None,
        language_prior_coef: float | None = None,
        language_prior_groups: list[str] | None = None,
        classifier_coef: float | None = None,
        train_earlier_rows: bool = False,
    ) -> None:
        """Train only routers and classifiers, with the language-prior loss on original languages (MoE-LPR, stage 2).

        After `add_languages`, it opens the new experts to every language, and trains only their rows; the prior loss
        then keeps every group that was there before away from them. Call `fit_routers(..., only="newest")` next:
        from rows in closed form a short review at a low rate moves the earlier languages least. Gates, too, had better
        start from `fit_routers`.

        Args:
            routing: None keeps the routing in force. Experts that were expanded under `"language"` become a learned
                mixture, which needs no `language_ids` and exports to stock architectures, with `"learned"`; their
                routers know nothing yet, so let the prior loss teach them every group.
            load_balancing_coef: None for 0.
            language_prior_coef: None for 0.1.
            language_prior_groups: None for the original languages and the groups before the newest growth step.
            classifier_coef: None for 0.1; of use under `"classifier"` routing, whose gates learn here.
            train_earlier_rows: for an adapter that has grown, whether the rows that it had before train, too. Removing
                the new group then no longer gives back the model before it.
        """
        self._start_stage(
            stage="review",
            open_steps=self.active_config.newest_step,
            routing=routing,
            load_balancing_coef=load_balancing_coef,
            language_prior_coef=language_prior_coef,
            language_prior_groups=language_prior_groups,
            classifier_coef=classifier_coef,
            train_earlier_rows=train_earlier_rows,
        )

    def add_languages(
        self,
        languages: Mapping[str, str],
        experts: Mapping[str, int | Sequence[int]] | None = None,
        start_from: StartFrom = None,
    ) -> None:
        """Add languages to a trained adapter; nothing that it computes for the others changes.

        A group that is new gets experts and router rows, appended to the old ones. From then on only those train:
        first in expansion, which starts here, then in `start_review`. Under `"learned"` routing they serve no other
        group, nor tokens of unknown language, before that review. A language may also join a group that exists.

        Args:
            languages: new language codes -> groups, new or known.
            experts: new group -> experts in each transformed layer, as in `MoeDeltaConfig`.
            start_from: the group whose experts the new ones start as, one for all or `{new group: group}`; see
                `closest_group`. None for expert 0.

        Raises:
            LanguageError: a language that the adapter knows already.
            PlanError: a group name in use, counts that do not fit, an unknown group in `start_from`, or an adapter with
                `modules_to_save`.
        """
        check_whole(self, "add_languages")
        add_languages(self, languages, experts, start_from)
        if experts:
            self.start_expansion()

    def remove_group(self, group: str) -> None:
        """Take away the group that was added last, its experts and its languages: the model before it, bit for bit.

        Unless rows were trained with `train_earlier_rows=True`, which changes them for good.

        Raises:
            PlanError: it is not the group that was added last.
            LanguageError: languages of other groups came after its own, and their ids would change.
        """
        check_whole(self, "remove_group")
        remove_group(self, group)

    def load_experts(self, checkpoints: Mapping[str, Source | Sequence[Source]]) -> None:
        """Give groups' experts the weights of dense checkpoints; see `initialisation.load_experts`."""
        check_whole(self, "load_experts")
        load_experts(self, checkpoints)

    def add_tokens(self, tokens: list[str], first_id: int, pieces: list[list[int]]) -> None:
        """Grow the active adapter's vocabulary; `extend_vocabulary` does it with the tokenizer.

        Args:
            tokens: the new tokens, as the tokenizer spells them.
            first_id: id of the first; the others follow.
            pieces: ids of the known tokens that each was made of; its rows start as the mean of theirs.

        Raises:
            PlanError: the adapter has new tokens already, or the ids leave a gap.
            ArchitectureError: the model's embeddings cannot grow.
        """
        check_whole(self, "add_tokens")
        add_tokens(self, tokens, first_id, pieces)

    def graft(self, post_trained: str | Path | PreTrainedModel, **options: Any) -> PeftModel:
        """The same experts over the post-trained checkpoint; see `graft.memory`."""
        check_whole(self, "graft", f"{GRAFT} --target adapter")
        return graft(self, post_trained, **options)

    def merge_and_graft(self, post_trained: str | Path | PreTrainedModel, **options: Any) -> PreTrainedModel:
        """A stand-alone stock model with the post-training delta on every expert; see `graft.memory`."""
        check_whole(self, "merge_and_graft", GRAFT)
        return merge_and_graft(self, post_trained, **options)

    def _start_stage(self, **changes: Any) -> None:
        config = self.active_config
        changes["routing"] = changes["routing"] or config.routing
        replace(config, **changes).check_top_k(self.plan())  # refuses what does not fit before anything is changed
        config.change(**changes)
        self.set_adapter(self.active_adapters)
        keep_findable(self.model)
