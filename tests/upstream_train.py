"""Runs in the original LLaVA's environment: its own training, unchanged but for what each run asks, and what its steps saw.

    python upstream_train.py JOB.json

JOB is a list of runs:
    arguments   the original's command line, without the leading dashes
    record      a safetensors file to write: for each step and part `STEP.PART.NAME` with input_ids and labels (as the collator
                made them, <image> one token of -200), images, expanded_labels (as the model's own function made them, pictures
                put in); `STEP.gradient.NAME` of the projector as the optimizer saw it; `losses` [steps]
    labels      None, or how many labels each step's batch has: the loss is then divided by that number, rather than each part's
                by its own labels (the one change to what is trained)
    adapters    None, or a safetensors file with LoRA's first weights
    tower_fp32  keep the tower in fp32; the original puts it into half precision in every fp32 run
Samples come in the file's order.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler

from llava_bridge import upstream

upstream.install()
upstream.do_without_deepspeed()
import llava.train.train as original  # noqa: E402

IGNORE = -100
LLaVATrainer = original.LLaVATrainer
to_half = upstream.ExportedTower.to


class RecordingTrainer(LLaVATrainer):
    run: dict  # set before each run

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.tensors, self.losses, self.part = {}, [0.0], 0
        if self.run["adapters"]:
            parameters = dict(self.model.named_parameters())
            first = load_file(self.run["adapters"])
            assert first.keys() == {name for name in parameters if "lora_" in name}, list(first)[:3]
            with torch.no_grad():
                for name, value in first.items():
                    parameters[name].copy_(value)

    def _get_train_sampler(self):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False):
        loss = super().compute_loss(model, inputs)
        if self.run["labels"] is None:
            return loss
        of_part = int((self.expanded_labels[:, 1:] != IGNORE).sum())
        return loss * of_part * self.args.gradient_accumulation_steps / self.run["labels"][len(self.losses) - 1]

    def training_step(self, model, inputs):
        prepare = model.get_base_model() if hasattr(model, "get_base_model") else model
        with torch.no_grad():
            self.expanded_labels = prepare.prepare_inputs_labels_for_multimodal(
                inputs["input_ids"], None, inputs["attention_mask"], None, inputs["labels"], inputs["images"]
            )[5]
        seen = {name: inputs[name] for name in ("input_ids", "labels", "images")}
        for name, value in {**seen, "expanded_labels": self.expanded_labels}.items():
            self.tensors[f"{len(self.losses) - 1}.{self.part}.{name}"] = value.clone()
        loss = super().training_step(model, inputs)  # divided by the number of parts already
        self.losses[-1] += float(loss)
        self.part += 1
        return loss

    def create_optimizer(self):
        optimizer = super().create_optimizer()
        optimizer.register_step_pre_hook(self.before_step)
        return optimizer

    def before_step(self, *_):
        step = len(self.losses) - 1
        for name, parameter in self.model.named_parameters():
            if "mm_projector" in name:
                name = name[name.index("mm_projector.") + len("mm_projector.") :]
                self.tensors[f"{step}.gradient.{name}"] = parameter.grad.clone()
        self.losses, self.part = [*self.losses, 0.0], 0

    def save_state(self):
        super().save_state()
        losses = torch.tensor(self.losses[:-1], dtype=torch.float64)
        save_file({**self.tensors, "losses": losses}, self.run["record"])


original.LLaVATrainer = RecordingTrainer
for run in json.loads(Path(sys.argv[1]).read_text()):
    RecordingTrainer.run = run
    upstream.ExportedTower.to = (lambda tower, *_, **__: tower) if run["tower_fp32"] else to_half
    sys.argv = ["train", *(word for name, value in run["arguments"].items() for word in (f"--{name}", str(value)))]
    original.train()
