"""Reward model: pairs in one forward, the score at EOS, dropout off, accuracy as counted by hand, a stock result."""

import json
import math
import subprocess
import sys

import embedded
import numpy as np
import pytest
import torch
from datasets import Dataset
from reward_model import (
    RewardModelConfig,
    RewardTrainer,
    disable_dropout,
    fit_reward_model,
    load_reward_model,
    pad_pairs,
    pair_metrics,
    train_reward_model,
)
from supervised import Inputs, training_arguments
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
)

from rlhf.data.supervised import tokenize_preferences
from rlhf.errors import InputError
from rlhf.models.lora import LoRASettings
from rlhf.rewards.model import RewardModel
from tests.rounding import EPS

PRAISE, BLAME = ("good", "nice", "great"), ("bad", "poor", "awful")
ROWS = [
    {
        "prompt": f"review of the {adjective} bakery:",
        "chosen": f"the coffee was {good}.",
        "rejected": f"ok. the food was {bad}.",
    }
    for adjective in ("cheap", "old", "new", "small")
    for good in PRAISE
    for bad in BLAME
]


def config(tmp_path, **changes):
    settings = {"model": str(tmp_path / "start"), "dataset": "memory", "output_dir": str(tmp_path / "out")}
    return RewardModelConfig(**{**settings, "progress": False, "batch_size": 12, "learning_rate": 3e-3, **changes})


def save_start(folder):
    """A small untrained language model and its tokenizer."""
    torch.manual_seed(0)
    architecture = embedded.model_config()
    architecture.hidden_size, architecture.intermediate_size, architecture.num_hidden_layers = 32, 32, 1
    architecture.num_attention_heads = architecture.num_key_value_heads = 2
    architecture.head_dim = 16
    LlamaForCausalLM(architecture).save_pretrained(folder)
    embedded.tokenizer().save_pretrained(folder)
    return str(folder)


def gpt2(**changes):
    """Absolute positions and dropout: what Llama would hide."""
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=len(embedded.tokenizer()),
            n_embd=16,
            n_layer=2,
            n_head=2,
            num_labels=1,
            pad_token_id=0,
            **changes,
        )
    )


def pairs():
    return list(tokenize_preferences(Dataset.from_list(ROWS), embedded.tokenizer(), max_tokens=64))


def score_alone(model, ids):
    """The score of one unpadded row from its last token, by hand."""
    hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
    return (hidden[0, -1] @ model.score.weight[0]).item()


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_batch_loss_equals_the_pairs_scored_one_by_one_at_their_eos(tmp_path, margin):
    model, tokenizer = gpt2(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3), embedded.tokenizer()
    settings = config(tmp_path, margin=margin, center_coefficient=0.1)
    disable_dropout(model)
    model.train()
    trainer = RewardTrainer(model=model, args=training_arguments(settings), config=settings)
    loss, scores = trainer.compute_loss(model, pad_pairs(pairs(), tokenizer.pad_token_id), return_outputs=True)

    expected = []
    for row, (chosen, rejected) in zip(pairs(), scores, strict=True):
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id
        alone = score_alone(model, row["chosen_ids"]), score_alone(model, row["rejected_ids"])
        assert (chosen.item(), rejected.item()) == pytest.approx(alone, abs=2048 * EPS)
        gap = alone[0] - alone[1] - margin
        expected.append(math.log1p(math.exp(-gap)) + 0.1 * sum(alone) ** 2)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), abs=2048 * EPS)


def test_dropout_is_off_in_every_kind_of_layer():
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    disable_dropout(model)
    model.train()
    ids = torch.tensor([pairs()[0]["chosen_ids"]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    architecture = embedded.model_config()
    architecture.attention_dropout = 0.5
    llama = LlamaForCausalLM(architecture)
    disable_dropout(llama)
    llama.train()
    assert torch.equal(llama(input_ids=ids).logits, llama(input_ids=ids).logits)


def test_pair_metrics_by_hand():
    scores = np.array([[2.0, 0.0], [1.0, 1.0], [-1.0, 3.0], [1.0, 0.0]])
    metrics = pair_metrics(scores)
    assert metrics["eval_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert metrics["eval_margin"] == (2 + 0 - 4 + 1) / 4
    assert metrics["eval_score_mean"] == 7 / 8


def test_it_learns_praise_from_blame_and_stock_transformers_gives_the_same_scores(tmp_path, capsys):
    save_start(tmp_path / "start")
    rows, tokenizer = Dataset.from_list(ROWS), embedded.tokenizer()
    model = load_reward_model(str(tmp_path / "start"), seed=0)
    folder = fit_reward_model(model, Inputs(tokenizer, rows, rows), config(tmp_path, num_epochs=15))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_accuracy"] == 1.0
    assert abs(metrics["eval_score_mean"]) < 0.25 * metrics["eval_margin"]  # centred
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "accuracy 100.0%" in printed

    stock, saved = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert stock.config.num_labels == 1
    text = ROWS[0]["prompt"] + " " + ROWS[0]["chosen"] + saved.eos_token
    for side in ("left", "right"):
        saved.padding_side = side
        inputs = saved([text, text + " ok ok ok"], padding=True, return_tensors="pt", return_token_type_ids=False)
        assert stock(**inputs).logits[0].item() == pytest.approx(
            score_alone(model.eval(), pairs()[0]["chosen_ids"]), abs=1e-4
        )
    assert score_elsewhere(folder, pairs()[0]["chosen_ids"]) == pytest.approx(
        score_alone(model, pairs()[0]["chosen_ids"]), abs=128 * EPS
    )


def score_elsewhere(folder, ids):
    """The score that a process gives which never imports this toolkit."""
    code = (
        "import sys, json, torch; from transformers import AutoModelForSequenceClassification as A;"
        "m = A.from_pretrained(sys.argv[1]).eval(); ids = torch.tensor([json.loads(sys.argv[2])]);"
        "print(m(input_ids=ids).logits.item()); assert 'rlhf' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(ids)], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


def test_the_backbone_comes_from_the_language_model_and_only_the_head_is_new(tmp_path):
    start = save_start(tmp_path / "start")
    language_model, reward_model = LlamaForCausalLM.from_pretrained(start), load_reward_model(start, seed=1)
    for (name, expected), actual in zip(
        language_model.model.named_parameters(), reward_model.model.parameters(), strict=True
    ):
        assert torch.equal(actual, expected), name
    assert torch.equal(reward_model.score.weight, load_reward_model(start, seed=1).score.weight)
    assert not torch.equal(reward_model.score.weight, load_reward_model(start, seed=2).score.weight)
    assert reward_model.score.weight.std().item() == pytest.approx(33**-0.5, rel=0.5)  # 32 draws


def test_a_reward_model_that_is_trained_further_keeps_its_head(tmp_path):
    model = load_reward_model(save_start(tmp_path / "start"), seed=1)
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(load_reward_model(str(tmp_path / "trained"), seed=2).score.weight, model.score.weight)


def test_accumulated_microbatches_give_the_gradient_of_the_whole_batch(tmp_path):
    start, weights = save_start(tmp_path / "start"), []
    for size in (12, 3):
        model = load_reward_model(start, seed=0)
        settings = config(tmp_path, microbatch_size=size, output_dir=str(tmp_path / f"out{size}"))
        fit_reward_model(model, Inputs(embedded.tokenizer(), Dataset.from_list(ROWS), None), settings)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=0)  # three Adam steps move weights by up to 9e-3


def test_from_files_on_disk(tmp_path):
    save_start(tmp_path / "start")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = str(tmp_path / "pairs.jsonl")
    folder = train_reward_model(config(tmp_path, dataset=path, eval_dataset=path))
    assert 0 <= json.loads((folder / "metrics.json").read_text())["eval_accuracy"] <= 1


def test_with_lora_the_adapter_and_its_head_are_saved_and_score_alike_when_loaded(tmp_path):
    save_start(tmp_path / "start")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = str(tmp_path / "pairs.jsonl")
    changes = {
        "dataset": path,
        "eval_dataset": path,
        "num_epochs": 20,
        "lora": LoRASettings(r=4),
        "learning_rate": 1e-2,
    }
    folder = train_reward_model(config(tmp_path, **changes))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not (folder / "model.safetensors").exists() and metrics["eval_accuracy"] == 1.0
    judge = RewardModel.load(folder, policy_tokenizer=embedded.tokenizer())
    rows = tokenize_preferences(Dataset.from_list(ROWS), embedded.tokenizer(), max_tokens=64)
    gaps = [judge.score([row["chosen_ids"]])[0] - judge.score([row["rejected_ids"]])[0] for row in rows]
    assert sum(gaps) / len(gaps) == pytest.approx(metrics["eval_margin"], rel=1e-4)


@pytest.mark.parametrize("bad", [{"margin": -1.0}, {"center_coefficient": -0.1}])
def test_bad_settings_are_refused_by_name(tmp_path, bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        config(tmp_path, **bad)


def test_a_pad_token_that_is_eos_is_refused(tmp_path):
    tokenizer = embedded.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(InputError, match="pads with its EOS token"):
        fit_reward_model(gpt2(), Inputs(tokenizer, Dataset.from_list(ROWS), None), config(tmp_path))
