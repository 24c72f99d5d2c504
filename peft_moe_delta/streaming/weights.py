"""Grafted weights, computed as they are asked for (DeltaMoE, arXiv 2605.18083; the equations are in `delta`).

In: base, post-trained model and adapter as files. Out: mappings from name to tensor that read what one tensor needs,
compute it and forget it. While `dry` they give shapes and dtypes alone, on the meta device, and read nothing: that is
how a job knows every file's layout before it starts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..architectures import TRANSPOSED_MLP, mlp_module_name
from ..attention import Borrowed
from ..checkpoint import CheckpointReader, first_few
from ..delta import PostTrainingDelta, Scale, all_finite, graft_tensor, low_rank_weight, rounded, scale_of_groups
from ..delta.vocabulary import VocabularyMap, is_embedding, with_new_rows
from ..errors import CheckpointError, GraftError
from ..export import AttentionWeights, LazyTensors, UpcycledWeights
from ..plan import ExpertPlan
from ..tuner.fingerprint import check_fingerprint, fingerprint
from ..tuner.vocabulary import first_new_id
from .adapter import AdapterFile, Block

_LEFTOVERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Endings of buffers in old files that models compute themselves."""


@dataclass
class Sources:
    """What a graft reads, and how much of it counts.

    Attributes:
        base_files, post_trained: the dense checkpoints.
        base: the base's weights, embeddings in the post-trained model's rows.
        adapter: the adapter.
        config: of the post-trained model; its vocabulary is the grafted model's.
        plan: the adapter's experts.
        scale: share of the delta.
        expert_scales: group -> share of its experts' own change.
        vocabulary: how embedding rows belong together; None where row r is row r.
        dry: whether tensors come without content.
    """

    base_files: CheckpointReader
    base: Mapping[str, Tensor]
    post_trained: CheckpointReader
    adapter: AdapterFile
    config: PretrainedConfig
    plan: ExpertPlan
    scale: Scale
    expert_scales: dict[str, float]
    vocabulary: VocabularyMap | None
    dry: bool = True

    @classmethod
    def open(
        cls, base: CheckpointReader, post_trained: CheckpointReader, adapter: AdapterFile, config: PretrainedConfig,
        scale: Scale, expert_scale: float | Mapping[str, float], vocabulary: VocabularyMap | None,
    ) -> Sources:  # fmt: skip
        """Check that the three belong together.

        Raises:
            GraftError: base and post-trained model have other names or shapes.
            CheckpointError: the adapter belongs to another base.
        """
        aligned = PostTrainingDelta.from_checkpoints(base, post_trained, vocabulary).base
        plan = adapter.plan(config.num_hidden_layers)
        scales = scale_of_groups(plan.groups[1:], expert_scale)
        sources = cls(base, aligned, post_trained, adapter, config, plan, scale, scales, vocabulary)
        for layer, block in adapter.mlps.items():
            if block.module.rpartition(".")[2] != mlp_module_name(config.model_type):
                raise GraftError(f"The experts of layer {layer} stand for {block.module}, which is not the MLP.")
        if saved := adapter.config.base_fingerprint:
            check_fingerprint(saved, base, sources.transformed(), verify_weights=True)
        return sources

    def __post_init__(self) -> None:
        self.grafted_config = copy.deepcopy(self.adapter.config)
        self.grafted_config.first_new_token_id = first_new_id(self.adapter.config, self.vocabulary)
        weights = self.upcycled()
        self.mlp_names, self.attention_names = weights.mlp_names, weights.attention_names
        if self.adapter.new_rows:
            self.config = copy.deepcopy(self.config)
            self.config.vocab_size = len(self.dense(next(iter(self.adapter.new_rows))))

    def upcycled(self) -> UpcycledWeights:
        """The grafted model, for layouts."""
        adapter, kind = self.adapter, self.adapter.config.attention_experts
        return UpcycledWeights(
            config=self.config,
            plan=self.plan,
            top_k=adapter.config.experts_per_token,
            dense=GraftedDense(self),
            experts=lambda layer, e: self._expert(adapter.mlps[layer], self.mlp_names[layer], layer, e),
            routers=lambda layer: self._rows(adapter.mlps[layer].router),
            classifiers={n: partial(self._rows, mlp.classifier) for n, mlp in adapter.mlps.items() if mlp.classifier},
            attention=None if kind is None else AttentionWeights(
                kind,
                experts=lambda layer, e: self._expert(adapter.attentions[layer], self.attention_names[layer], layer, e),
                routers=lambda layer: self._rows(adapter.attentions[layer].router),
            ),
        )  # fmt: skip

    def _rows(self, parts: list[str]) -> Tensor:
        """The rows of a router or a gate."""
        return torch.cat([self.stored(key) for key in parts])

    def _expert(self, block: Block, names: Mapping[str, str], layer: int, expert: int) -> LazyTensors:
        """An expert's tensors by their names inside of the module, `names` being the dense model's."""
        return LazyTensors(names, lambda inner: self.expert(block, names[inner], inner, layer, expert))

    def stored(self, key: str) -> Tensor:
        """A tensor of the adapter as it is."""
        return self.adapter.reader.meta(key) if self.dry else _finite(self.adapter.reader[key], key)

    def dense(self, name: str) -> Tensor:
        """`W_0 + s (P - W_0)`; at scale 1 the post-trained file's own bytes. Embeddings have the new tokens' rows."""
        rows = self.adapter.new_rows
        if not rows or not is_embedding(name):
            return self._dense(name)
        new = self.stored(rows.get(name) or next(iter(rows.values())))  # a tied output embedding has none of its own
        assert self.grafted_config.first_new_token_id is not None
        return with_new_rows(self._dense(name), new, self.grafted_config.first_new_token_id)

    def _dense(self, name: str) -> Tensor:
        post, scale, key = self.post_trained, self.scale.of(name), self.adapter.saved.get(name)
        if self.dry:
            return post.meta(name)
        after = _finite(post[name], name)
        if not after.is_floating_point() or (key is None and scale == 1):
            return after
        if key is not None:
            return rounded(self.saved(key, name), after.dtype, name)
        return graft_tensor(self._base(name), after, scale=scale, name=name)

    def saved(self, key: str, name: str) -> Tensor:
        """A tensor of `modules_to_save`, grafted whole, in the adapter's dtype."""
        dtype, post = self.adapter.reader.dtypes[key], self.post_trained
        if self.dry:
            return torch.empty(post.shapes[name], dtype=dtype, device="meta")
        trained, after = self.adapter.reader[key], post[name]
        if self.vocabulary is not None and is_embedding(name):
            trained = self.vocabulary.align(trained, after)
        return graft_tensor(self._base(name), after, trained, scale=self.scale.of(name), dtype=dtype, name=name)

    def expert(self, block: Block, name: str, inner: str, layer: int, expert: int) -> Tensor:
        """An expert's weight: `D + a (E - W_0)`, or `D + a B A` over the dense weight `D`.

        Args:
            block: the module that has experts.
            name: of the dense weight.
            inner: the same inside of the module.
            layer, expert: whose it is.
        """
        keys = block.experts[expert]
        if self.dry:
            dtype = self.adapter.reader.dtypes[keys[inner]] if inner in keys else self.post_trained.dtypes[name]
            return torch.empty(self.post_trained.shapes[name], dtype=dtype, device="meta")
        if inner in keys:
            return self.grafted(keys[inner], name, layer, expert)
        owner, _, attribute = inner.rpartition(".")
        shared = self.adapter.config.attention_experts == "shared_kv" and block is self.adapter.attentions.get(layer)
        if shared and owner in Borrowed.PARTS:
            return self.dense(name)
        if attribute == "bias":
            return self.dense(name)  # low-rank experts keep the frozen map's
        if f"{owner}.A" not in keys or f"{owner}.B" not in keys:
            raise CheckpointError(f"{self.adapter.reader.path} lacks {inner} of expert {expert} in {block.module}.")
        A, B = self.stored(keys[f"{owner}.A"]), self.grafted(keys[f"{owner}.B"], None, layer, expert)
        return low_rank_weight(self.dense(name), A, B, transposed=self.config.model_type in TRANSPOSED_MLP)

    def grafted(self, key: str, name: str | None, layer: int, expert: int) -> Tensor:
        """A tensor of an expert for an adapter over the post-trained model, in the adapter's dtype.

        Args:
            key: its name in the adapter's file.
            name: of the dense weight that it stands for; None for one side of a low-rank change.
            layer, expert: whose it is.
        """
        if self.dry:
            return self.adapter.reader.meta(key)
        tensor = self.adapter.reader[key]
        scale = self.expert_scales[self.plan.group_of_expert(layer, expert)]
        if name is None:
            return _finite(tensor * scale if key.endswith(".B") else tensor, key)
        return graft_tensor(
            self._base(name), self.post_trained[name], tensor, scale=self.scale.of(name), expert_scale=scale,
            dtype=tensor.dtype, name=name,
        )  # fmt: skip

    def fingerprint_of_post_trained(self) -> dict[str, object]:
        """What a grafted adapter says of its base."""
        return fingerprint(self.post_trained, self.transformed())

    def transformed(self) -> list[Mapping[str, str]]:
        """Of each MLP that the adapter transforms: name inside it -> name in the dense model."""
        layers = self.adapter.config.wanted_layers or sorted(self.mlp_names)
        if self.adapter.config.base_fingerprint and self.adapter.config.base_fingerprint["blocks"] != len(layers):
            layers = sorted(self.adapter.mlps)
        return [self.mlp_names[layer] for layer in layers]

    def _base(self, name: str) -> Tensor:
        if name not in self.base:
            raise GraftError(f"The base model's files lack {name}, which the post-trained model's hold. Save it again.")
        return self.base[name]


class GraftedDense(Mapping[str, Tensor]):
    """The grafted dense weights under the post-trained checkpoint's names."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._names = [name for name in sources.post_trained if not name.endswith(_LEFTOVERS)]
        unknown = {*sources.adapter.saved, *sources.adapter.new_rows} - set(self._names)
        if unknown:
            raise CheckpointError(
                f"The adapter holds {first_few(sorted(unknown))}, which the post-trained model lacks. It belongs to "
                "another model, or needs a newer version of this package."
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._sources.dense(name)

    def __contains__(self, name: object) -> bool:
        return name in self._sources.post_trained

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _finite(tensor: Tensor, name: str) -> Tensor:
    """Pass a tensor on if all its values are numbers."""
    if not all_finite(tensor):
        raise GraftError(f"{name} holds values that are not finite. The checkpoint is damaged; fetch it again.")
    return tensor
