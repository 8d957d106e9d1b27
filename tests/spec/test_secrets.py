"""A secret in an override is refused, and the refusal does not repeat it."""

import pytest

from mora_repro.errors import UserError
from mora_repro.spec.compose import compose_config, options
from mora_repro.spec.secrets import refuse_secrets

SECRET = "s3cr3t-0123456789"


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        refuse_secrets(overrides)
    said = str(caught.value)
    assert SECRET not in said and "environment" in said
    return said


@pytest.mark.parametrize("variable", ["HF_TOKEN", "WANDB_API_KEY", "my_client_secret", "DB_PASSWORD"])
def test_the_value_of_a_secret_variable_is_refused_wherever_it_stands(monkeypatch, variable):
    monkeypatch.setenv(variable, SECRET)
    said = refused("method=lora", f"model.pretrained=some/{SECRET}/path")
    assert variable in said and "model.pretrained=..." in said
    assert "argument 1" in refused(SECRET)
    assert "argument 2" in refused("r=8", f"+{SECRET}=1")


def test_other_variables_and_short_values_are_no_secrets(monkeypatch):
    monkeypatch.setenv("KEYBOARD", SECRET)
    monkeypatch.setenv("SOME_KEY", "lora")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    refuse_secrets([f"model.pretrained={SECRET}", "method=lora"])


@pytest.mark.parametrize(
    "override",
    [
        f"hf_token={SECRET}",
        f"+logger.api_key={SECRET}",
        f"++logger.apikey={SECRET}",
        f"logger.password={SECRET}",
        f"+task.hub.HF_TOKEN={SECRET}",
        f"logger={{name: wandb, api_key: {SECRET}}}",
        f"+model.kwargs={{'token': '{SECRET}'}}",
        f"model.pretrained=https://user:{SECRET}@host/model",
        f"model.pretrained=https://{SECRET}@host/model",
        f"https://user:{SECRET}@host=1",
    ],
)
def test_a_key_named_like_a_secret_and_credentials_in_a_url_are_refused(override):
    refused("method=lora", override)


def test_what_people_really_write_is_accepted(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    refuse_secrets(
        [
            "method=mora",
            "scale=mini",
            "task.max_new_tokens=64",
            "model.tokenizer=bytes",
            "task.copy_key=true",
            "model.pretrained=meta-llama/Llama-2-7b-hf",
            "task.data=https://example.org/a@b",
            "+method.peft.num_virtual_tokens=8",
            "method.peft.target_modules=[q_proj,v_proj]",
            "logger=wandb",
            "logger.project=token",
        ]
    )


@pytest.mark.parametrize("logger", options("logger"))
def test_no_key_of_the_configuration_looks_like_a_secret(logger):
    keys = []

    def walk(node, prefix):
        for key, value in node.items_ex(resolve=False):
            keys.append(f"{prefix}{key}=1")
            if hasattr(value, "items_ex"):
                walk(value, f"{prefix}{key}.")

    walk(compose_config(["task=gsm8k", f"logger={logger}"]), "")
    assert len(keys) > 50
    refuse_secrets(keys)
