"""Checkpoints as safetensors files: read lazily, written whole or not at all.

- `paths`: folders and Hub ids; which files belong to a folder
- `header`: a file's header, checked and made
- `reader`: `CheckpointReader`, a mapping from tensor name to tensor
- `folder`: files and folders that appear whole; jobs that can be taken up again
- `shards`: tensors streamed into files whose places are planned
- `manifest`: what a folder was made from; `verify`
"""

from .folder import Job, check_space, resumable_folder, whole_folder, write_safetensors
from .header import DTYPES, unique_json
from .manifest import MANIFEST_FILE, file_sha256, read_manifest, verify, write_manifest
from .paths import ADAPTER_FILES, HUB_FILES, inside, resolve, within
from .reader import INDEX_FILE, SINGLE_FILE, CheckpointReader, first_few
from .shards import Shard, plan_shards, write_index, write_shards

__all__ = [
    "ADAPTER_FILES",
    "DTYPES",
    "HUB_FILES",
    "INDEX_FILE",
    "MANIFEST_FILE",
    "SINGLE_FILE",
    "CheckpointReader",
    "Job",
    "Shard",
    "check_space",
    "file_sha256",
    "first_few",
    "inside",
    "plan_shards",
    "read_manifest",
    "resolve",
    "resumable_folder",
    "unique_json",
    "verify",
    "whole_folder",
    "within",
    "write_index",
    "write_manifest",
    "write_safetensors",
    "write_shards",
]
