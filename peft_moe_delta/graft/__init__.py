"""Grafting: an adapter trained on the base model moves onto the post-trained one (DeltaMoE, arXiv 2605.18083).

- `arithmetic`, `scale`: the graft of one tensor, and how much of it
- `rows`: embedding rows matched by token string
- `dense`, `adapter`: a dense model and an adapter as tensors by name, in memory or as files
- `weights`: the graft of a whole model, wherever its tensors lie
- `memory`: `graft`, `merge_and_graft`
- `files`: `graft_checkpoint`, which reads a `trio`, writes one of the `targets`, and `side_files` beside it
- `lora`: `to_lora`, languages as LoRA folders
- `kinship`, `doubts`, `check`: what belongs together, what looks doubtful, what was made computes what it should
- `delta`, `stored`, `apply`, `picture`: `PostTrainingDelta`, its file, that file over its base, its picture
- `report`, `explain`: what a graft says of itself; what an adapter can be shipped as

Import from the modules: lower ones are used by lower folders.
"""
