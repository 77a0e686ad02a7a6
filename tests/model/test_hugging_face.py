"""Models of transformers, and what saves, loads, adapts and trains them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import InvalidArgument, kasmina_layers, kasminify
from kasmina_fx.testing import graft

# Of peft's own calls of transformers, and of transformers' of older releases of torch.
pytestmark = [
    pytest.mark.untraced,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
os.environ["HF_HUB_OFFLINE"] = "1"
transformers: Any = pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")
accelerate: Any = pytest.importorskip("accelerate")
safetensors: Any = pytest.importorskip("safetensors.torch")

IDS: Final = torch.arange(14).view(2, 7) * 3
TINY: Final = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 50,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _gpt2() -> Any:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, **TINY)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config)


def _of(name: str, config: str, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        made = getattr(transformers, config)(**(TINY | settings))
        return getattr(transformers, name)(made)

    return build


ZOO: Final[dict[str, Callable[[], Any]]] = {
    "gpt2": _gpt2,
    "bert": _of("BertForMaskedLM", "BertConfig", intermediate_size=32),
    "albert": _of("AlbertForMaskedLM", "AlbertConfig", intermediate_size=32, embedding_size=16),
    "deberta": _of(
        "DebertaV2ForMaskedLM", "DebertaV2Config", intermediate_size=32, relative_attention=True
    ),
    "llama": _of("LlamaForCausalLM", "LlamaConfig", intermediate_size=32, num_key_value_heads=2),
    "mamba": _of("MambaForCausalLM", "MambaConfig", state_size=4),
}
each = pytest.mark.parametrize("kind", ZOO)


def model_of(kind: str, grown: bool = False) -> Any:
    torch.manual_seed(0)
    model = kasminify(ZOO[kind]().eval(), num_seeds=4, compile=False)
    if grown:
        for layer in kasmina_layers(model).values():
            graft(layer, [0, 2], "mlp")
    return model


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


@each
def test_dormant_is_the_plain_model_and_weights_may_be_tied_again(kind: str) -> None:
    torch.manual_seed(0)
    plain = ZOO[kind]().eval()
    model = model_of(kind)
    assert torch.equal(logits(model), logits(plain))
    model.tie_weights()
    assert torch.equal(logits(model), logits(plain))


@each
def test_embeddings_may_be_resized_and_the_head_gets_seeds_for_the_new_features(kind: str) -> None:
    torch.manual_seed(0)
    plain = ZOO[kind]().eval()
    model = model_of(kind)
    before = {name: layer.num_seeds for name, layer in kasmina_layers(model).items()}
    for each_model in (model, plain):
        torch.manual_seed(1)
        each_model.resize_token_embeddings(60)
    assert torch.equal(logits(model), logits(plain))
    if kind == "llama":  # of a head that is not tied, transformers makes a new one, a plain one
        del before["lm_head"]
    assert {name: layer.num_seeds for name, layer in kasmina_layers(model).items()} == before


def test_a_head_into_which_seeds_have_grown_is_not_resized() -> None:
    model = model_of("gpt2", grown=True)
    with pytest.raises(InvalidArgument, match=r"lm_head: out_features can't become 60"):
        model.resize_token_embeddings(60)


@each
def test_save_pretrained_and_back(kind: str, tmp_path: Path) -> None:
    model, fresh = model_of(kind, grown=True), model_of(kind)
    model.save_pretrained(tmp_path)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
    fresh.tie_weights()
    torch.testing.assert_close(logits(fresh), logits(model))
    plain = type(model).from_pretrained(tmp_path).eval()  # names the seeds' entries, and goes on
    dormant = model_of(kind)
    torch.testing.assert_close(logits(plain), logits(dormant))


def test_safetensors_and_back(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return kasminify(nn.Sequential(nn.Linear(4, 6)), num_seeds=3, compile=False)

    model, fresh, x = net(), net(), torch.randn(2, 4)
    graft(kasmina_layers(model)["0"], [0], "mlp")
    graft(kasmina_layers(fresh)["0"], [1], "mlp")
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(x), model(x))


def test_accelerate_and_back(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net = kasminify(nn.Sequential(nn.Linear(4, 6)), num_seeds=3, compile=False)
    graft(kasmina_layers(net)["0"], [0], "mlp")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net, optimizer = accelerator.prepare(net, optimizer)
    x = torch.randn(2, 4)

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(net(x).square().sum())
        optimizer.step()

    step()
    accelerator.save_state(tmp_path)
    step()
    expected = net(x)
    graft(kasmina_layers(net)["0"], [1], "mlp")
    accelerator.load_state(tmp_path)
    step()
    torch.testing.assert_close(net(x), expected)


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    settings = transformers.TrainingArguments(
        tmp_path, max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    whole, resumed = model_of("llama", grown=True), model_of("llama", grown=True)
    transformers.Trainer(whole, settings, train_dataset=data).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    transformers.Trainer(resumed, settings, train_dataset=data).train(checkpoint)
    torch.testing.assert_close(logits(resumed.eval()), logits(whole.eval()))


def test_peft_over_seeds_computes_saves_and_merges(tmp_path: Path) -> None:
    model = model_of("llama", grown=True)
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    torch.testing.assert_close(logits(adapted), before)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=30.0)
    judge = model_of("llama", grown=True)  # its seeds see the sum, as those of a merged model do
    with torch.no_grad():
        for number, layer in enumerate(judge.model.layers):
            adapter = adapted.base_model.model.model.layers[number].self_attn.q_proj
            layer.self_attn.q_proj.weight += adapter.get_delta_weight("default")
    assert (logits(judge) - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    assert len(safetensors.load_file(tmp_path / "adapter_model.safetensors")) == 4
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(judge))
    assert len(kasmina_layers(merged)) == len(kasmina_layers(model_of("llama")))


def test_adapters_of_peft_are_left_alone() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    adapted = peft.get_peft_model(ZOO["llama"](), config)
    report = kasminify(adapted, num_seeds=4, dry_run=True)
    assert not any("lora_" in name for name in report.taken)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    assert f"{path}.base_layer" in report.taken
    assert report.left[f"{path}.lora_A.default"] == f"it is part of an adapter of {path}"
    kasminify(adapted, num_seeds=4, compile=False)
    assert set(kasmina_layers(adapted)) == set(report.taken)


def test_a_dry_run_says_what_gpt2_leaves() -> None:
    model = ZOO["gpt2"]()
    report = kasminify(model, num_seeds=4, dry_run=True)
    assert report.taken == {"lm_head": 4}
    assert report.left["transformer.h.0.attn.c_attn"] == "a Conv1D is none of the targets"
    assert "lm_head: 4 seeds" in str(report)
    assert type(model.lm_head) is nn.Linear
