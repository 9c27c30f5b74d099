"""Training steps of transformers' unchanged models, with the native loss and under `patch_torch()`.

    python -m benchmarks.frameworks [--device cpu|cuda] [--quick] [--only PATTERN] [--json FILE]

`pip install '.[clients]'`. The models are built from a configuration, with random weights, and learn from the data of
`benchmarks.training`. They compute their loss themselves, from `labels=`. The vocabularies are those of the published
models, the networks before them are small: on a GPU the loss has about this share of a step with large networks.

* `patched` calls cross_entropy_ext.patch_torch() before it begins, and is otherwise the same as `native`.
* `DDP` is DistributedDataParallel with one rank. `Trainer's DDP` is DDP as transformers' Trainer makes it by default:
  with find_unused_parameters=True, for which DDP copies all that the model returns, the logits included.

A record is one of `benchmarks.training`, without the loss's part of a step, which the model hides.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cross_entropy_ext

from . import command_line, data
from .pages import Section
from .tables import Block
from .training import COMPILED, EAGER, NATIVE, SEED, Batch, Clock, Size, Training, Workload, crops, digits, run, table

PATCHED = "patched"
IGNORED = -100  # transformers' own, for words
MASKED = 0.15  # of the words, as BERT was trained
VARIANTS = [(NATIVE, EAGER), (PATCHED, EAGER)]
COMPILED_TOO = [*VARIANTS, (NATIVE, COMPILED), (PATCHED, COMPILED)]
# Variants are compared step by step, and compiled ones draw other random numbers.
NO_DROPOUT = {
    "GPT-2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "BERT": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


class Client(Training):
    """A model that takes labels and returns its loss."""

    def __init__(self, workload: Workload, size: Size, device: str, loss: str, mode: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        if loss == PATCHED:
            cross_entropy_ext.patch_torch()
        super().__init__(workload, size, device, NATIVE, mode)

    def forward_eager(self, inputs: Tensor, targets: Tensor, clock: Clock) -> Tensor:
        return self.model_and_loss(inputs, targets)

    def model_and_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, labels=targets).loss


class DistributedClient(Client):
    """The same under DDP, in a world of one process."""

    def __init__(
        self, workload: Workload, size: Size, device: str, loss: str, mode: str, *, find_unused_parameters: bool
    ) -> None:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        super().__init__(workload, size, device, loss, mode)
        self.model = DistributedDataParallel(self.model, find_unused_parameters=find_unused_parameters)


# -- The models ----------------------------------------------------------------------------------------------


def llama(vocabulary: int, size: Size) -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=size.length,
            num_key_value_heads=size.model["num_attention_heads"] // 2,
            **size.model,
        )
    )


def gpt2(vocabulary: int, size: Size) -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=size.length,
            n_embd=size.model["hidden_size"],
            n_layer=size.model["num_hidden_layers"],
            n_head=size.model["num_attention_heads"],
            bos_token_id=0,
            eos_token_id=0,
            **NO_DROPOUT["GPT-2"],
        )
    )


def bert(vocabulary: int, size: Size) -> nn.Module:
    import transformers

    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocabulary, max_position_embeddings=size.length, **size.model, **NO_DROPOUT["BERT"]
        )
    )


def vit(classes: int, size: Size) -> nn.Module:
    import transformers

    return transformers.ViTForImageClassification(
        transformers.ViTConfig(num_labels=classes, image_size=size.length, patch_size=8, num_channels=1, **size.model)
    )


def segformer(classes: int, size: Size) -> nn.Module:
    """SegFormer-B0, with the sizes that `size` gives."""
    import transformers

    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_labels=classes,
            semantic_loss_ignore_index=data.NO_CLASS,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
            **size.model,
        )
    )


# -- What they are trained with ------------------------------------------------------------------------------


def sentences(vocabulary: int, size: Size) -> list[Batch]:
    """Words from random places. The model itself shifts the labels by one."""
    text, random = data.words(vocabulary), np.random.default_rng(SEED)

    def batch() -> Batch:
        words = text[random.integers(len(text) - size.length, size=(size.batch, 1)) + np.arange(size.length)]
        return words, words

    return [batch() for _ in range(size.steps)]


def gaps(vocabulary: int, size: Size) -> list[Batch]:
    """The same with some words masked, which are the labels."""
    random = np.random.default_rng(SEED)

    def batch(words: np.ndarray) -> Batch:
        hidden = random.random(words.shape) < MASKED
        return np.where(hidden, 0, words), np.where(hidden, words, IGNORED)

    return [batch(words) for words, _ in sentences(vocabulary, size)]


SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
B0 = {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2]}
WORKLOADS = [
    Workload(
        "Llama, 32k words",
        32_000,
        llama,
        sentences,
        {"cpu": Size(8, 128, 16, SMALL), "cuda": Size(8, 1024, 50, LARGE), "quick": Size(4, 32, 6, TINY)},
        training=Client,
        variants=COMPILED_TOO,
    ),
    Workload(
        "Llama, 32k words, DDP",
        32_000,
        llama,
        sentences,
        {"cpu": Size(4, 128, 8, SMALL)},
        training=partial(DistributedClient, find_unused_parameters=False),
        variants=VARIANTS,
    ),
    Workload(
        "Llama, 32k words, Trainer's DDP",
        32_000,
        llama,
        sentences,
        {"cpu": Size(4, 128, 8, SMALL)},
        training=partial(DistributedClient, find_unused_parameters=True),
        variants=VARIANTS,
    ),
    Workload(
        "GPT-2, 50k words",
        50_257,
        gpt2,
        sentences,
        {"cpu": Size(8, 128, 16, SMALL), "cuda": Size(8, 1024, 50, LARGE)},
        training=Client,
        variants=VARIANTS,
    ),
    Workload(
        "BERT, 30k words",
        30_522,
        bert,
        gaps,
        {"cpu": Size(8, 128, 16, SMALL), "cuda": Size(32, 512, 50, LARGE)},
        training=Client,
        variants=VARIANTS,
    ),
    Workload(
        "SegFormer, 150 classes",
        150,
        segformer,
        crops,
        {"cpu": Size(2, 256, 10, B0), "cuda": Size(16, 384, 50, B0)},
        training=Client,
        variants=VARIANTS,
    ),
    Workload(
        "ViT, 10 classes",
        10,
        vit,
        digits,
        {"cpu": Size(256, 32, 24, SMALL), "cuda": Size(1024, 32, 50, LARGE), "quick": Size(32, 32, 6, TINY)},
        training=Client,
        variants=VARIANTS,
    ),
]


def blocks(device: str, result: dict) -> list[Block]:
    return [
        "Whole training steps of transformers' unchanged models, which compute their loss themselves from `labels=`: "
        "with the native loss, and after `patch_torch()`. Losses agree step by step.",
        table(result["records"]),
    ]


SECTION = Section("frameworks", "Programs that do not know this package", blocks)


def main() -> None:
    parser = command_line.parser_of(__doc__, "frameworks", "two tiny models, under a minute", "models")
    run(command_line.parse(parser), WORKLOADS)


if __name__ == "__main__":
    main()
