"""The graft of a whole model: what every tensor of it becomes (DeltaMoE, arXiv 2605.18083).

In: the base model, its post-trained sibling and an adapter, in memory or as files. Out: the grafted dense weights, and
the grafted tensors of each expert, computed as they are asked for and forgotten. Of tensors without content (the meta
device) come tensors without content: shapes and dtypes are known before anything is read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from ..architectures import TRANSPOSED_MLP, mlp_module_name
from ..attention import Borrowed
from ..errors import CheckpointError, GraftError
from ..export import AttentionWeights, IdentifierWeights, LazyTensors, UpcycledWeights
from ..plan import ExpertPlan
from ..routing import ClassifierRouting
from ..tensors import Tensors, all_finite, is_embedding, low_rank_weight, rounded, with_new_rows
from ..tuner.config import MoeDeltaConfig
from ..tuner.fingerprint import check_fingerprint, fingerprint
from ..tuner.identifier import groups_of, scores_of
from .adapter import Adapter, Block
from .arithmetic import graft_tensor
from .delta import PostTrainingDelta
from .dense import Dense
from .report import GraftReport
from .rows import VocabularyMap, first_new_id
from .scale import Scale, scale_of_groups


class GraftedWeights:
    """What base, post-trained model and adapter make together.

    Attributes:
        post_trained: the post-trained model.
        base: the base's tensors, embeddings in the post-trained model's rows.
        adapter: the adapter.
        adapter_config: its config over the post-trained model.
        config: of the grafted dense model.
        tied: its tied tensors -> those that they share.
        plan: the adapter's experts.
        scale: share of the delta.
        expert_scales: group -> share of its experts' own change.
        names: the grafted dense model's tensors, tied ones once.

    Raises:
        GraftError: base and post-trained model have other names or shapes, or a bad scale.
        CheckpointError: the adapter belongs to another model.
    """

    def __init__(
        self, base: Dense, post_trained: Dense, adapter: Adapter, scale: Scale,
        expert_scale: float | Mapping[str, float] | str, vocabulary: VocabularyMap | None,
    ) -> None:  # fmt: skip
        self.base: Tensors = PostTrainingDelta.from_checkpoints(base.tensors, post_trained.tensors, vocabulary).base
        self.post_trained, self.adapter, self.scale, self.vocabulary = post_trained, adapter, scale, vocabulary
        adapter.check_names(post_trained.tensors)
        self.plan = adapter.plan(post_trained.config.get_text_config().num_hidden_layers)
        self.expert_scales = scale_of_groups(self.plan.groups[1:], expert_scale)
        self.tied = {
            target: source
            for target, source in post_trained.tied.items()
            if self._stays_tied(target, source, tied_in_base=base.tied.get(target) == source)
        }
        self.names = tuple(name for name in post_trained.tensors if name not in self.tied)
        self.adapter_config = copy.deepcopy(adapter.config)
        self.adapter_config.change(first_new_token_id=first_new_id(adapter.config, vocabulary))
        if (fitted := adapter.config.record.identifier) is not None and (counted := self._counted_ids) is not None:
            self.adapter_config.change(identifier=dataclasses.replace(fitted, vocabulary=len(counted)))
        self.config = self._config()

    def _stays_tied(self, target: str, source: str, *, tied_in_base: bool) -> bool:
        """Whether two tensors that the post-trained model shares are still one after the graft.

        They are not where the adapter trains one of them, or where the base has two whose share remains.
        """
        whole = self.scale.of(target) == self.scale.of(source) == 1
        return not {target, source} & set(self.adapter.saved) and (tied_in_base or whole)

    def _config(self) -> PretrainedConfig:
        config, rows = copy.deepcopy(self.post_trained.config), self.adapter.new_rows
        if getattr(config, "tie_word_embeddings", False) and not self.tied:
            config.tie_word_embeddings = False
        if rows:
            name = next(iter(rows))
            config.vocab_size = max(len(self.post_trained.tensors.meta(name)), self._first_new() + self._num_new())
        return config

    def _first_new(self) -> int:
        first = self.adapter_config.record.first_new_token_id
        assert first is not None
        return first

    def _num_new(self) -> int:
        return len(self.adapter.config.record.new_tokens)

    # -- the dense model ----------------------------------------------------------------------------------------------

    def dense(self, name: str) -> Tensor:
        """`W_0 + s (P - W_0)`; at scale 1 the post-trained tensor itself. Embeddings have the new tokens' rows."""
        rows = self.adapter.new_rows
        if not rows or not is_embedding(name):
            return self._dense(name)
        new = self.stored(rows.get(name) or next(iter(rows.values())))  # a tied output embedding has none of its own
        return with_new_rows(self._dense(name), new, self._first_new())

    def dense_before_adapter(self, name: str) -> Tensor:
        """The same without what the adapter holds of it."""
        after = _finite(self.post_trained.tensors[name], name)
        scale = self.scale.of(name) if after.is_floating_point() else 1.0
        return after if scale == 1 else graft_tensor(self.base[name], after, scale=scale, name=name)

    def _dense(self, name: str) -> Tensor:
        if name in self.adapter.saved:
            return rounded(self._saved(name), self.post_trained.tensors.meta(name).dtype, name)
        return self.dense_before_adapter(name)

    def _saved(self, name: str) -> Tensor:
        """A tensor of `modules_to_save`, grafted whole, in the adapter's dtype."""
        trained, after = self.adapter.tensors[self.adapter.saved[name]], self.post_trained.tensors[name]
        dtype = trained.dtype
        if self.vocabulary is not None and is_embedding(name):
            trained = self.vocabulary.align(trained, after)
        return graft_tensor(self.base[name], after, trained, scale=self.scale.of(name), dtype=dtype, name=name)

    # -- the adapter --------------------------------------------------------------------------------------------------

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of the adapter over the grafted dense model, as they are saved."""
        of_expert = {
            key: (block, inner, layer, expert)
            for layer, expert, block, keys in self.adapter.experts()
            for inner, key in keys.items()
        }
        saved = {key: name for name, key in self.adapter.saved.items()}
        changed = set(self.adapter.changed.values())
        for key in self.adapter.tensors:
            if key in of_expert:
                yield key, self._of_expert(key, *of_expert[key])
            elif key in saved:
                yield key, self._saved(saved[key])
            elif key == self.adapter.identifier:
                yield key, self._counts(key)
            elif key not in changed:  # embeddings of a resized base: the grafted model has its own
                yield key, self.stored(key)

    def _counts(self, key: str) -> Tensor:
        """The identifier's token counts, by the grafted model's ids."""
        counts, ids = self.adapter.tensors[key], self._counted_ids
        if ids is None:
            return counts
        unknown = counts.new_full((len(counts), 1), -1)  # which `ids` finds as the last column
        return torch.cat([counts, unknown], dim=1)[:, ids.to(counts.device)]

    @cached_property
    def _counted_ids(self) -> Tensor | None:
        """Id in the grafted model -> the one that the identifier has counted it under, int64; -1 for a token that the
        base does not know, which says nothing of any language. None where every id stays what it is."""
        fitted = self.adapter.config.record.identifier
        if fitted is None:
            return None
        first, now = (c.record.first_new_token_id for c in (self.adapter.config, self.adapter_config))
        own = fitted.vocabulary if first is None else min(first, fitted.vocabulary)
        ids = torch.arange(own)
        if self.vocabulary is not None and not self.vocabulary.is_same:
            ids = self.vocabulary.base_row.masked_fill(self.vocabulary.base_row >= own, -1)
        if now is not None and fitted.vocabulary > own:
            ids = F.pad(ids[:now], (0, max(0, now - len(ids))), value=-1)
            ids = torch.cat([ids, torch.arange(own, fitted.vocabulary)])
        return None if torch.equal(ids, torch.arange(fitted.vocabulary)) else ids

    def stored(self, key: str) -> Tensor:
        """A tensor of the adapter as it is."""
        return _finite(self.adapter.tensors[key], key)

    def _of_expert(self, key: str, block: Block, inner: str, layer: int, expert: int) -> Tensor:
        """A tensor of an expert, in the adapter's dtype: `W_0 + a (E - W_0) + s (P - W_0)`, or one side of `a B A`."""
        tensor = self.adapter.tensors[key]
        share = self.expert_scales[self.plan.group_of_expert(layer, expert)]
        name = f"{block.module}.{inner}"
        if name in self.base:
            return graft_tensor(
                self.base[name], self.post_trained.tensors[name], tensor, scale=self.scale.of(name),
                expert_scale=share, dtype=tensor.dtype, name=name,
            )  # fmt: skip
        # W_0 + B A + Delta = P + B A: the change is re-attached, shrunk on one side
        return _finite(tensor * share if key.endswith(".B") else tensor, key)

    def expert(self, layer: int, expert: int, block: Block) -> Mapping[str, Tensor]:
        """An expert's weights under their names inside of its module, low-rank ones summed up: `D + a B A`."""
        prefix = f"{block.module}."
        names = [name.removeprefix(prefix) for name in self.post_trained.order if name.startswith(prefix)]
        return LazyTensors(names, lambda inner: self._expert_weight(block, inner, layer, expert))

    def _expert_weight(self, block: Block, inner: str, layer: int, expert: int) -> Tensor:
        keys, name = block.experts[expert], f"{block.module}.{inner}"
        if inner in keys:
            return self._of_expert(keys[inner], block, inner, layer, expert)
        owner, _, attribute = inner.rpartition(".")
        shared = self.adapter.config.attention_experts == "shared_kv" and block is self.adapter.attentions.get(layer)
        if attribute == "bias" or (shared and owner in Borrowed.PARTS):
            return self.dense(name)  # low-rank experts keep the frozen map's bias; keys and values may be shared
        sides = {side: f"{owner}.{side}" for side in "AB"}
        if not set(sides.values()) <= keys.keys():
            raise CheckpointError(f"{self.adapter.source} lacks {inner} of expert {expert} in {block.module}.")
        A, B = (self._of_expert(keys[side], block, side, layer, expert) for side in sides.values())
        return low_rank_weight(self.dense(name), A, B, transposed=self.config.model_type in TRANSPOSED_MLP)

    def _rows(self, parts: list[str]) -> Tensor:
        """The rows of a router or a gate."""
        return torch.cat([self.stored(key) for key in parts])

    # -- the whole, and what is told of it -----------------------------------------------------------------------------

    def upcycled(self) -> UpcycledWeights:
        """The grafted model for export, with all of its experts.

        Raises:
            GraftError: what became experts is not the MLP.
        """
        mlps, attentions = self.adapter.mlps, self.adapter.attentions
        for layer, block in mlps.items():
            if block.module.rpartition(".")[2] != mlp_module_name(self.config.model_type):
                raise GraftError(
                    f"The experts of layer {layer} stand for {block.module}, which is not the MLP. Keep the adapter "
                    "with graft."
                )
        return upcycled_weights(
            self.config,
            self.adapter.config,
            self.plan,
            LazyTensors(self.names, self.dense),
            experts=lambda layer, e: self.expert(layer, e, mlps[layer]),
            routers=lambda layer: self._rows(mlps[layer].router),
            classifiers={n: partial(self._rows, mlp.classifier) for n, mlp in mlps.items() if mlp.classifier},
            attention_experts=lambda layer, e: self.expert(layer, e, attentions[layer]),
            attention_routers=lambda layer: self._rows(attentions[layer].router),
            identifier=self._identifier(),
        )

    def _identifier(self) -> IdentifierWeights | None:
        """What reads the language from the text, for export."""
        config, key = self.adapter_config, self.adapter.identifier
        if config.must_be_told or config.record.identifier is None or key is None:
            return None
        fitted = config.record.identifier
        return IdentifierWeights(
            scores=lambda: scores_of(config, self._counts(key)),
            vocabulary=fitted.vocabulary,
            memory=fitted.memory,
            threshold=fitted.threshold,
            group_of=groups_of(config),
        )

    def report(
        self, post_trained: str, warnings: tuple[str, ...] = (), trials: tuple[tuple[float, float], ...] = ()
    ) -> GraftReport:
        """What the graft says of itself, as an adapter."""
        scale, record = self.scale.value, self.adapter_config.record
        return GraftReport(
            post_trained,
            dict(scale) if isinstance(scale, Mapping) else scale,
            self.expert_scales,
            trials,
            new_tokens=record.new_tokens,
            first_new_token_id=record.first_new_token_id,
            warnings=warnings,
        )

    def check_finite(self) -> None:
        """Refuse a damaged post-trained model whole, though an adapter over it holds a part of it only.

        Raises:
            GraftError: one of its tensors is not finite.
        """
        for name in self.names:
            _finite(self.post_trained.tensors[name], name)

    # -- which base the adapter belongs to ----------------------------------------------------------------------------

    def check_base(self, base: Dense) -> None:
        """Refuse a base model that the adapter was not made for.

        Raises:
            CheckpointError: see `check_fingerprint`.
        """
        if (saved := self.adapter.config.record.base_fingerprint) is not None:
            check_fingerprint(saved, base.tensors, self._blocks(base), verify_weights=True)

    def fingerprint(self, model: Dense) -> dict[str, object]:
        """What an adapter with these blocks says of its base."""
        return fingerprint(model.tensors, len(self._blocks(model)))

    def _blocks(self, model: Dense) -> list[dict[str, str]]:
        """Of each MLP that the adapter transforms, in layer order: name inside of it -> name in the model."""
        layers = self.adapter.config.wanted_layers or sorted(self.adapter.mlps)
        saved = self.adapter.config.record.base_fingerprint
        if saved and saved["blocks"] != len(layers):
            layers = sorted(self.adapter.mlps)
        module = next(iter(self.adapter.mlps.values())).module
        prefixes = [_in_layer(module, layer) + "." for layer in layers]
        return [{n.removeprefix(start): n for n in model.order if n.startswith(start)} for start in prefixes]


def upcycled_weights(
    config: PretrainedConfig,
    adapter: MoeDeltaConfig,
    plan: ExpertPlan,
    dense: Mapping[str, Tensor],
    *,
    experts: Callable[[int, int], Mapping[str, Tensor]],
    routers: Callable[[int], Tensor],
    classifiers: Mapping[int, Callable[[], Tensor]],
    attention_experts: Callable[[int, int], Mapping[str, Tensor]],
    attention_routers: Callable[[int], Tensor],
    identifier: IdentifierWeights | None = None,
) -> UpcycledWeights:
    """The weights of an upcycled model for export: what its adapter's config says is said here, and nowhere else."""
    kind, by_language = adapter.attention_experts, adapter.routing_rule.needs_language
    return UpcycledWeights(
        config=config,
        plan=plan,
        top_k=adapter.experts_per_token,
        dense=dense,
        experts=experts,
        routers=routers,
        renormalise=adapter.norm_topk_prob,
        classifiers=classifiers if isinstance(adapter.routing_rule, ClassifierRouting) else {},
        attention=None if kind is None else AttentionWeights(kind, attention_experts, attention_routers),
        languages=adapter.language_table if by_language else None,
        identifier=identifier,
    )


def exported_share(
    weights: UpcycledWeights, config: MoeDeltaConfig, language: str | None, *, remote_code: bool = False
) -> UpcycledWeights:
    """What is exported of an upcycled model: the group's share that a language runs on, or all of it.

    Raises:
        GraftError: no stock architecture can say how this adapter routes; or a language is missing, or given where
            routing does not ask for one.
    """
    table, by_language = config.language_table, config.routing_rule.needs_language
    if reason := why_not_encodable(config):
        raise GraftError(f"{reason} Or use graft() and share the adapter.")
    if by_language and language is None:
        if remote_code:
            return weights
        raise GraftError(
            f"Routing {config.routing!r} cannot be encoded in a stock architecture, which has no input for a token's "
            f"language. Pass language=... (one of {', '.join(table.codes)}) for the model that this language runs "
            'on, remote_code=True (from file to file: target="remote_code") for a model with its own modelling file, '
            "or use graft() and share the adapter."
        )
    if not by_language and language is not None:
        raise GraftError(
            f"language={language!r} selects experts under routing by language, but this adapter's routing is "
            f"{config.routing!r}: every language uses all experts. Leave `language` out."
        )
    return weights if language is None else weights.for_group(table.groups[table.group_of[table.id_of(language)]])


def why_not_encodable(config: MoeDeltaConfig) -> str | None:
    """Why no stand-alone form can say what an adapter's routing does, and what to do; None where one may."""
    if not config.routing_rule.needs_language and config.record.open_steps < config.newest_step:
        groups = zip(config.language_table.groups, config.steps, strict=True)
        closed = [group for group, step in groups if step > config.record.open_steps]
        return (
            f"The experts of {', '.join(closed)} are not open to every language yet, which no stand-alone model can "
            "say. Train the new groups' rows first: start_review(), then a short training on all languages."
        )
    return None


def _in_layer(module: str, layer: int) -> str:
    """The name of a module, in another decoder layer."""
    parts = module.split(".")
    parts[next(index for index, part in enumerate(parts) if part.isdigit())] = str(layer)
    return ".".join(parts)


def _finite(tensor: Tensor, name: str) -> Tensor:
    """Pass a tensor on if all its values are numbers."""
    if not all_finite(tensor):
        raise GraftError(f"{name} holds values that are not finite. The checkpoint is damaged; fetch it again.")
    return tensor
