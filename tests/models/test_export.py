"""What a run hands out is the policy it trained: opened again, it says the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.errors import TrainingError
from rlhf.models.export import check_export, save_policy
from rlhf.models.policy import Policy
from rlhf.runs.jsonlines import read_metrics
from tests import tiny

IDS = torch.tensor([[3, 4, 5, 6]])


def shared_though_untied(family: str):
    """One embedding for input and output, and a configuration that says that they are two."""
    lm = tiny.causal_lm(family, tie_word_embeddings=False)
    lm.get_output_embeddings().weight = lm.get_input_embeddings().weight
    return lm


@pytest.mark.parametrize(
    "make", [shared_though_untied, tiny.causal_lm, lambda f: tiny.causal_lm(f, tie_word_embeddings=True)]
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_exported_policy_is_the_policy(family, make, tmp_path):
    lm = make(family)
    save_policy(Policy(lm), tiny.tokenizer(), tmp_path / "policy")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, lm(IDS).logits)


def test_a_run_on_a_shared_embedding_exports_what_it_trained(tmp_path):
    lm = shared_though_untied("llama")
    tiny.trainer(tmp_path, lm=lm, total_steps=2).train()
    assert len(read_metrics(tmp_path)) == 2
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, lm(IDS).logits)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight  # and left the model as it was


@pytest.mark.parametrize("frozen", ["mlp", "embed_tokens"])
def test_frozen_bfloat16_beside_trained_float32_is_exported_exactly(frozen, tmp_path):
    """Also where the first weight, by which transformers names the precision of all, is one of the frozen."""
    lm = tiny.causal_lm(tie_word_embeddings=False)
    for name, parameter in lm.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.bfloat16()
    save_policy(Policy(lm), tiny.tokenizer(), tmp_path / "policy")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert opened.dtype == torch.float32
    for name, tensor in lm.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor.float()), name


def test_a_tied_model_of_two_precisions_is_written_once(tmp_path):
    sizes = []
    for narrow in ((), ("mlp",)):
        lm = tiny.causal_lm(tie_word_embeddings=True)
        for name, parameter in lm.named_parameters():
            if any(part in name for part in narrow):
                parameter.data = parameter.data.bfloat16()
        save_policy(Policy(lm), tiny.tokenizer(), tmp_path / f"policy{len(sizes)}")
        sizes.append((tmp_path / f"policy{len(sizes)}" / "model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


def test_an_export_that_narrows_a_buffer_is_refused(tmp_path):
    lm = tiny.causal_lm().bfloat16()
    lm.save_pretrained(tmp_path)
    check_export(lm, tmp_path, lm.state_dict())
    lm.register_buffer("scale", torch.tensor([1 / 3]))
    with pytest.raises(TrainingError, match="scale"):
        check_export(lm, tmp_path, lm.state_dict())


@pytest.mark.parametrize("damage", ["a number", "a missing tensor"])
def test_an_export_that_is_another_policy_is_refused_and_named(damage, tmp_path):
    lm = tiny.causal_lm()
    lm.save_pretrained(tmp_path)
    check_export(lm, tmp_path, lm.state_dict())
    with torch.no_grad():
        if damage == "a number":
            lm.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
        else:  # as transformers writes a shared embedding whose configuration says otherwise
            shared_though_untied("llama").save_pretrained(tmp_path)
    with pytest.raises(
        TrainingError, match=r"does not load as the policy.*(up_proj|embed_tokens|lm_head).*last checkpoint"
    ):
        check_export(lm, tmp_path, lm.state_dict())


def test_an_export_that_fails_leaves_no_policy_and_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.models.export._equal", lambda *tensors: False)
    with pytest.raises(TrainingError, match="does not load as the policy"):
        tiny.trainer(tmp_path, total_steps=2).train()
    assert not (tmp_path / "policy").exists() and (tmp_path / "checkpoints" / "step-000002").is_dir()


def test_a_tokenizer_that_cannot_be_written_is_named_like_any_error_of_the_disk(tmp_path, monkeypatch):
    """Its library, in Rust, raises a bare Exception."""
    tokenizer = tiny.tokenizer()
    save = type(tokenizer).save_pretrained

    def obstructed(self, folder):
        (folder / "tokenizer.json").mkdir()
        return save(self, folder)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", obstructed)
    with pytest.raises(TrainingError, match=r"policy was not written: .*os error.*last checkpoint holds.*then resume"):
        save_policy(Policy(tiny.causal_lm()), tokenizer, tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []
