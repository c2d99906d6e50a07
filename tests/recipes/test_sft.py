"""SFT: the loss counts completion tokens and EOS alone, settings are checked early, the result is a stock model."""

import json
import math
from dataclasses import replace

import embedded
import pytest
import torch
from datasets import Dataset
from sft import SFTConfig, fine_tune, pad_completions, train_sft
from supervised import Inputs, split_batch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlhf.data.supervised import tokenize_completions
from rlhf.errors import InputError
from rlhf.models.adapters import base_name
from rlhf.models.lora import LoRASettings
from rlhf.models.policy import load_policy
from tests.rounding import EPS

ROWS = [
    {"prompt": "review of the cheap bakery:", "completion": "the coffee was rich."},
    {"prompt": "should i try the old film?", "completion": "the plot was gripping because you never guess."},
    {"prompt": "tell me about the new phone:", "completion": "ok."},
]


def config(tmp_path, **changes):
    settings = {"model": "memory", "dataset": "memory", "output_dir": str(tmp_path / "sft"), "progress": False}
    return SFTConfig(**{**settings, "batch_size": 3, "learning_rate": 5e-3, **changes})


def small_model():
    torch.manual_seed(0)
    architecture = embedded.model_config()
    architecture.hidden_size, architecture.intermediate_size, architecture.num_hidden_layers = 32, 32, 1
    architecture.num_attention_heads = architecture.num_key_value_heads = 2
    architecture.head_dim = 16
    return LlamaForCausalLM(architecture)


@pytest.fixture
def batch():
    tokenizer = embedded.tokenizer()
    rows = list(tokenize_completions(Dataset.from_list(ROWS), tokenizer, max_tokens=64))
    return pad_completions(rows, tokenizer.pad_token_id)


def test_labels_are_the_completion_and_its_eos_and_nothing_else(batch):
    tokenizer = embedded.tokenizer()
    for row, ids, labels, mask in zip(ROWS, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        padding = len(ids) - len(prompt) - len(completion) - 1
        assert labels.tolist() == [-100] * len(prompt) + completion + [tokenizer.eos_token_id] + [-100] * padding
        assert ids.tolist() == [*prompt, *completion, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding
        assert mask.tolist() == [1] * (len(ids) - padding) + [0] * padding


def test_batch_loss_equals_the_slow_mean_over_completion_tokens_row_by_row(batch):
    model, tokenizer = small_model().eval(), embedded.tokenizer()
    total, count = 0.0, 0
    for row in ROWS:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        for position in range(len(prompt), len(ids)):
            logits = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1]
            total -= logits.log_softmax(-1)[ids[position]].item()
            count += 1
    assert model(**batch).loss.item() == pytest.approx(total / count, abs=2048 * EPS)


def test_pad_that_equals_eos_still_trains_eos():
    batch = pad_completions([{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [5], "labels": [5]}], 2)
    assert batch["labels"].tolist() == [[-100, 6, 2], [5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_training_memorises_three_rows_and_saves_a_stock_model(tmp_path, capsys):
    rows = Dataset.from_list(ROWS)
    folder = fine_tune(small_model(), Inputs(embedded.tokenizer(), rows, rows), config(tmp_path, num_epochs=120))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_loss"] < 0.05
    assert capsys.readouterr().out.count("\n") == 1

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(ROWS[1]["prompt"], return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == ROWS[1]["completion"]
    assert out[-1] == tokenizer.eos_token_id  # it learnt to stop
    assert not list(folder.glob("*.bin"))  # no pickles


def test_with_lora_the_folder_holds_an_adapter_that_the_commands_load_with_its_base(tmp_path):
    small_model().save_pretrained(tmp_path / "start")
    embedded.tokenizer().save_pretrained(tmp_path / "start")
    rows = Dataset.from_list(ROWS)
    settings = config(tmp_path, num_epochs=30, lora=LoRASettings(r=8), learning_rate=2e-2)
    start = LlamaForCausalLM.from_pretrained(tmp_path / "start")
    before = {name: p.clone() for name, p in start.named_parameters()}
    folder = fine_tune(start, Inputs(embedded.tokenizer(), rows, rows), settings)
    assert (
        not (folder / "model.safetensors").exists() and (folder / "adapter_model.safetensors").stat().st_size < 60_000
    )
    policy = load_policy(str(folder))  # as `sample` and the trainers load it
    loaded = {base_name(name): p for name, p in policy.lm.named_parameters()}
    assert all(torch.equal(loaded[name], p) for name, p in before.items())
    inputs = tokenize_completions(rows, embedded.tokenizer(), max_tokens=64)
    batch = pad_completions(list(inputs), embedded.tokenizer().pad_token_id)
    with torch.no_grad():
        loss = policy.lm(**batch).loss.item()
    assert loss == pytest.approx(json.loads((folder / "metrics.json").read_text())["eval_loss"], rel=1e-4)
    with policy.with_adapter(None), torch.no_grad():
        assert policy.lm(**batch).loss.item() > loss + 0.5


def test_microbatches_do_not_change_the_result(tmp_path):
    rows, weights = Dataset.from_list(ROWS), []
    for size in (3, 1):
        model = small_model()
        settings = config(tmp_path, num_epochs=3, microbatch_size=size)
        fine_tune(
            model, Inputs(embedded.tokenizer(), rows, None), replace(settings, output_dir=str(tmp_path / f"out{size}"))
        )
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=0)  # one Adam step moves each weight by 5e-3


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path):
    rows, tokenizer = Dataset.from_list(ROWS * 2), embedded.tokenizer()
    whole = config(tmp_path, num_epochs=4, save_steps=4, output_dir=str(tmp_path / "whole"))
    final = small_model()
    fine_tune(final, Inputs(tokenizer, rows, None), whole)

    class Stop(Exception):
        pass

    from transformers import Trainer

    class Killed(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 6:
                raise Stop
            return super().training_step(*args, **kwargs)

    import sft

    cut = replace(whole, output_dir=str(tmp_path / "cut"))
    original, sft.Trainer = sft.Trainer, Killed
    try:
        with pytest.raises(Stop):
            fine_tune(small_model(), Inputs(tokenizer, rows, None), cut)
    finally:
        sft.Trainer = original
    assert not (tmp_path / "cut").exists()
    resumed = small_model()
    fine_tune(resumed, Inputs(tokenizer, rows, None), replace(cut, resume=True))
    for (name, expected), actual in zip(final.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)
    assert not (tmp_path / "cut.checkpoints").exists()


@pytest.mark.parametrize(
    ("microbatch", "processes", "expected"), [(8, 1, (8, 8)), (8, 2, (8, 4)), (32, 4, (16, 1)), (64, 2, (32, 1))]
)
def test_rows_times_forwards_times_processes_is_the_global_batch(microbatch, processes, expected):
    assert split_batch(64, microbatch, processes) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"num_epochs": -1},
        {"max_tokens": 0},
        {"warmup_fraction": 1.0},
        {"save_steps": -1},
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        config(tmp_path, **bad)


@pytest.mark.parametrize(("batch", "processes"), [(10, 1), (12, 2), (2, 3)])
def test_a_batch_that_does_not_split_is_refused(batch, processes):
    with pytest.raises(InputError, match=f"batch_size {batch} does not split"):
        split_batch(batch, 4, processes)


def test_a_full_output_folder_is_refused_before_the_model_is_looked_for(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        train_sft(config(tmp_path, model=str(tmp_path / "absent")))
    assert (tmp_path / "sft" / "precious.txt").read_text() == "mine"


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        train_sft(config(tmp_path, resume=True))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    tokenizer = embedded.tokenizer()
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(InputError, match="embeds only"):
        fine_tune(small_model(), Inputs(tokenizer, Dataset.from_list(ROWS), None), config(tmp_path))
