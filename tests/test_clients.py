"""patch_torch() under programs that other people wrote, unchanged: the losses and gradients are those without it, and
this package's operator is what computed them. `pip install '.[clients]'`; a client that is absent is skipped.

Models are tiny and their weights random; nothing is downloaded."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_patch import Graphs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from cross_entropy_ext import patch_torch, unpatch_torch

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
pytestmark = pytest.mark.slow
REASON = "the clients' extra is not installed"
transformers = pytest.importorskip("transformers", reason=REASON)

Batch = dict[str, Tensor]
IGNORED = -100  # transformers' own, for words
BORDER = 255  # and for pixels
WORDS, LENGTH, CLASSES = 512, 24, 7


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    unpatch_torch()


class Operators(TorchDispatchMode):
    """Counts the operators that run, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count[str(function)] += 1
        return function(*arguments, **(options or {}))

    def check(self, patched: bool, losses: int | None = None) -> None:
        """All losses were computed by this package, or all by PyTorch."""
        ours = self.count["cross_entropy_ext._forward.default"]
        native = sum(
            count for name, count in self.count.items() if name.startswith(("aten.nll_loss", "aten._log_soft"))
        )
        assert (ours > 0, native > 0) == (patched, not patched), self.count
        assert not patched or losses in (None, ours)


@contextlib.contextmanager
def only(patched: bool, losses: int | None = None) -> Iterator[None]:
    """Patched or not, and sure that it was so; for so many losses, if that is said."""
    operators = Operators()
    with patch_torch() if patched else contextlib.nullcontext(), operators:
        yield
    operators.check(patched, losses)


# -- Models and what they learn from -------------------------------------------------------------------------


def sentences(count: int) -> tuple[Tensor, Tensor]:
    """Words, the common ones more often, and a mask: sentences end at different places."""
    words = 1 + torch.multinomial(1 / torch.arange(1.0, WORDS), count * LENGTH, replacement=True).view(count, LENGTH)
    mask = torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (count, 1))
    return words * mask, mask.long()


def scenes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images of blurred patches, and which class each pixel is."""
    smooth = F.interpolate(torch.randn(count, CLASSES, 4, 4), size=(size, size), mode="bilinear")
    return smooth[:, :3] + 0.1 * torch.randn(count, 3, size, size), smooth.argmax(1)


def causal_batch(count: int) -> Batch:
    words, mask = sentences(count)
    return {"input_ids": words, "attention_mask": mask, "labels": words.masked_fill(mask == 0, IGNORED)}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
        )
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
    )


def masked_batch(count: int) -> Batch:
    """One word in seven is to be guessed."""
    words, mask = sentences(count)
    hidden = (torch.rand(words.shape) < 0.15) & (mask == 1)
    hidden[:, 0] = True
    return {
        "input_ids": words.masked_fill(hidden, WORDS - 1),
        "attention_mask": mask,
        "labels": words.masked_fill(~hidden, IGNORED),
    }


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
    )


def image_batch(count: int) -> Batch:
    images, classes = scenes(count, 32)
    return {"pixel_values": images, "labels": classes.flatten(1).mode(1).values}


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=CLASSES,
        )
    )


def segmentation_batch(count: int) -> Batch:
    """Pixels between two classes belong to neither, as in Pascal VOC."""
    images, classes = scenes(count, 64)
    border = F.pad(classes[:, :, 1:] != classes[:, :, :-1], (0, 1)) | F.pad(
        classes[:, 1:] != classes[:, :-1], (0, 0, 0, 1)
    )
    return {"pixel_values": images, "labels": classes.masked_fill(border, BORDER)}


def segformer() -> nn.Module:
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=32,
            num_labels=CLASSES,
            semantic_loss_ignore_index=BORDER,
        )
    )


CLIENTS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "Llama": (llama, causal_batch),
    "GPT-2": (gpt2, causal_batch),
    "BERT": (bert, masked_batch),
    "ViT": (vit, image_batch),
    "SegFormer": (segformer, segmentation_batch),
}


def client(name: str, batch_size: int = 4) -> tuple[nn.Module, Batch]:
    """The same weights and data whenever it is called."""
    torch.manual_seed(0)
    model, batch = CLIENTS[name]
    return model().train(), batch(batch_size)


def samples(name: str, count: int) -> list[Batch]:
    """A data set in memory."""
    torch.manual_seed(1)
    batch = CLIENTS[name][1](count)
    return [{key: tensor[i] for key, tensor in batch.items()} for i in range(count)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- One step of each ----------------------------------------------------------------------------------------


def step(model: nn.Module, batch: Batch, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all gradients, with the same dropout every time."""
    torch.manual_seed(2)
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CLIENTS)
def test_losses_and_gradients(name: str) -> None:
    results = []
    for patched in (False, True):
        model, batch = client(name)
        with only(patched, losses=1):
            results.append(step(model, batch))
    assert len(results[0][1]) > 10
    torch.testing.assert_close(results[1], results[0])


def test_a_sum_over_accumulated_batches() -> None:
    """What transformers' Trainer does: it tells the model how many words all batches of a step have together."""
    results = []
    for patched in (False, True):
        model, batch = client("Llama")
        with only(patched, losses=1):
            results.append(step(model, batch, num_items_in_batch=torch.tensor(150)))
    torch.testing.assert_close(results[1], results[0])


def test_half_precision_logits() -> None:
    """transformers makes float32 logits of them itself."""
    results = []
    for patched in (False, True):
        model, batch = client("Llama")
        with only(patched, losses=1), torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, batch))
    torch.testing.assert_close(results[1][0], results[0][0])
    # Gradients are bfloat16 on their way, where the last bit of one is a hundredth of another.
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_compiled(name: str) -> None:
    """The model with its loss inside, in one graph forward and one backward."""
    results = []
    for patched in (False, True):
        model, batch = client(name)
        graphs = Graphs()
        with patch_torch() if patched else contextlib.nullcontext():
            loss, gradients = step(torch.compile(model, backend=graphs, fullgraph=True), batch)
        assert len(graphs.graphs) == 2 and graphs.ours() == patched
        results.append((loss, list(gradients.values())))
    torch.testing.assert_close(results[1], results[0])


# -- Trainers ------------------------------------------------------------------------------------------------


def test_transformers_trainer(tmp_path: Path) -> None:
    """With gradient accumulation, of which the last step is a short one."""
    pytest.importorskip("accelerate", reason=REASON)
    results = []
    for patched in (False, True):
        model, _ = client("Llama")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=3,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=samples("Llama", 28), eval_dataset=samples("Llama", 8)
        )
        with only(patched, losses=14 + 2):
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 8 and losses[-1] < losses[0]
        results.append((torch.tensor([*losses, evaluated]), parameters(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)


def test_accelerate() -> None:
    """A loop of one's own, and batches of which two make a step."""
    accelerate = pytest.importorskip("accelerate", reason=REASON)
    results = []
    for patched in (False, True):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, _ = client("BERT")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(samples("BERT", 16), batch_size=4))
        losses, gradients = [], []
        with only(patched, losses=4):
            for batch in loader:
                with accelerator.accumulate(model):
                    losses.append(model(**batch).loss)
                    accelerator.backward(losses[-1])
                    if accelerator.sync_gradients:
                        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
                    optimizer.step()
                    optimizer.zero_grad()
        assert len(gradients) == 2
        results.append((torch.stack(losses).detach(), gradients, parameters(model)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed_data_parallel(find_unused_parameters: bool) -> None:
    """In both ways that transformers' Trainer has of making it; DDP's world is this process."""
    results = []
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        for patched in (False, True):
            model, batch = client("Llama")
            parallel = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
            with only(patched, losses=1):
                loss, _ = step(parallel, batch, num_items_in_batch=torch.tensor(150))
            results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(results[1], results[0])


def test_lightning_trainer(tmp_path: Path) -> None:
    """A classifier with a module of the loss, made before anything was patched."""
    lightning = pytest.importorskip("pytorch_lightning", reason=REASON)

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, _ = client("ViT")
            self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
            self.losses: list[Tensor] = []

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = self.loss(self.model(batch["pixel_values"]).logits, batch["labels"])
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    results = []
    for patched in (False, True):
        classifier = Classifier()
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            accumulate_grad_batches=2,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with only(patched, losses=8):
            trainer.fit(classifier, DataLoader(samples("ViT", 32), batch_size=8))
        assert trainer.global_step == 4
        results.append((torch.stack(classifier.losses), parameters(classifier)))
    torch.testing.assert_close(results[1], results[0])
