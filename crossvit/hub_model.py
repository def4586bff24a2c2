"""Models as repositories of the Hugging Face hub, by the methods of ``PyTorchModelHubMixin``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from crossvit import checkpoint_files, checkpoint_hub, conventions
from crossvit.configs import Config, VitConfig, canonical_name, named_config

Self = TypeVar("Self", bound="HubModel")
#: The architecture from which ``model_args`` start where none has the model's name.
_BASES: dict[type, str] = {Config: "crossvit_15_240", VitConfig: "deit_small_patch16_224"}
_CARD = """---
library_name: crossvit
pipeline_tag: image-classification
tags:
- crossvit
- timm
- image-classification
---
# {name}

A {kind} of `crossvit`, for {classes} classes and images of {height} x {width} pixels.

    from crossvit import {kind}
    model = {kind}.from_pretrained("{repository}")

With timm, after `crossvit.timm.register()`:

    model = timm.create_model("hf-hub:{repository}", pretrained=True)
"""


class HubModel:
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    The signatures are those of ``huggingface_hub.PyTorchModelHubMixin``, which is imported when
    they need it. A repository has ``model.safetensors`` as ``save_checkpoint`` writes it, a
    ``config.json`` that timm reads, and a model card.
    """

    config: Any
    num_classes: int
    in_chans: int

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Return the model of a repository or directory, in eval mode.

        Args:
            pretrained_model_name_or_path: A hub id, of ``push_to_hub`` or of timm's CrossViT
                weights, or a directory of ``save_pretrained``.
            force_download: Download again what is in the cache.
            token: Access token of the hub; None for the stored one.
            cache_dir: Another cache.
            local_files_only: Only use the cache.
            revision: A branch, tag or commit of the repository.
            **options: Arguments of the model to change, e.g. ``use_fused=True``.

        Raises:
            FileNotFoundError: There is no such repository, directory or weights.
            ConnectionError: The hub cannot be reached, and the cache has no weights.
            ValueError: The model is of another class, or the weights do not say which it is.
            ImportError: huggingface_hub or safetensors is not installed.
        """
        from crossvit.checkpoints import load_model  # which makes models

        source = str(pretrained_model_name_or_path)
        hub_options = {
            "force_download": force_download,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "revision": revision,
        }
        chosen = {key: value for key, value in hub_options.items() if value not in (None, False)}
        path = checkpoint_files.locate(source, **chosen)
        if "name" not in options and (name := _name_in(source)) is not None:
            options["name"] = name
        model = load_model(path, **options)
        if not isinstance(model, cls):
            found = type(model).__name__
            raise ValueError(f"{source}: expected a {cls.__name__}, found a {found}")
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        class_names: Sequence[str] | None = None,
        repo_id: str = "",
    ) -> None:
        """Write the files of a repository into a directory, which is made if needed.

        Args:
            save_directory: Its path.
            class_names: Names of the classes, in the order of the logits.
            repo_id: The repository that the model card names; else the directory.

        Raises:
            ValueError: There is not one name for each class.
            ImportError: safetensors is not installed.
        """
        from crossvit.checkpoints import save_checkpoint

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self
        save_checkpoint(model, folder / "model.safetensors", class_names=class_names)
        description = timm_description(model)
        if class_names is not None:
            description["label_names"] = list(class_names)
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        height, width = conventions.image_size(self.config)
        card = _CARD.format(
            name=repo_id or folder.name,
            kind=type(self).__name__,
            classes=self.num_classes,
            height=height,
            width=width,
            repository=repo_id or folder,
        )
        (folder / "README.md").write_text(card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a CrossViT",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        class_names: Sequence[str] | None = None,
    ) -> str:
        """Upload the model to the hub, into a repository that is made if needed.

        Args:
            repo_id: ``owner/name``.
            commit_message: Of the upload.
            private: Whether a new repository is private; None for the owner's default.
            token: Access token of the hub; None for the stored one.
            branch: Of the repository; None for its main one.
            create_pr: Make a pull request.
            class_names: As for ``save_pretrained``.

        Returns:
            The URL of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError(
                f"push_to_hub needs huggingface_hub: {checkpoint_hub.INSTALL}"
            ) from error
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, class_names=class_names, repo_id=repo_id)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        return str(commit)


def timm_description(model: Any) -> dict[str, Any]:
    """Return the content of a ``config.json`` from which timm makes this model.

    ``crossvit.timm.register`` must have been called there. A model of no known name is another one
    with ``model_args``.
    """
    config = model.config
    name = conventions.architecture(config) or _BASES[type(config)]
    named = named_config(name)
    args = {k: v for k, v in vars(config).items() if v != getattr(named, k)}
    args |= {"global_pool": model.global_pool, "dynamic_img_size": model.dynamic_img_size}
    if not any(key.endswith("attn.qkv.bias") for key in model.state_dict()):
        args["qkv_bias"] = False
    ours = {"tag": "fused", "num_classes": model.num_classes, "architecture": name}
    return {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {
            k: v for k, v in {**model.pretrained_cfg, **ours}.items() if k != "hf_hub_id"
        },
        "model_args": args,
    }


def _name_in(source: str) -> str | None:
    """The name of the architecture in a hub id such as timm's."""
    if Path(source).exists():
        return None
    try:
        return canonical_name(source)
    except ValueError:
        return None
