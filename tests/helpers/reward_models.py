"""Reward models by transformers and peft alone, and the scores that these give: nothing here is this project's code."""

from pathlib import Path

import torch

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m.role == 'user' else '' }}{{ m.role }}: {{ m.content }}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Another one than that of the trained model."""


def save_reward_model(directory: Path, tokenizer, *, num_experts: int = 0) -> Path:
    """A random classifier with one label, made by transformers; once. Its template is not that of the trained model.

    With `num_experts` it is a mixture.
    """
    import transformers

    if (directory / "tokenizer.json").exists():
        return directory
    torch.manual_seed(11)
    experts = {"num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config_class = transformers.Qwen3MoeConfig if num_experts else transformers.Qwen2Config
    config = config_class(
        **(experts if num_experts else {}),
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def save_adapter(directory: Path, base: Path) -> Path:
    """A random LoRA adapter with a head of its own, made by peft on the language model in `base`; once."""
    import peft
    import transformers

    if (directory / "tokenizer.json").exists():
        return directory
    torch.manual_seed(12)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = transformers.AutoConfig.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, config=config)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, settings)
    tuned.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def plain_scores(directory: Path, conversations: list[list[dict[str, str]]]) -> list[float]:
    """What transformers (and peft) says of each conversation, one at a time, without padding."""
    import peft
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if (directory / "adapter_config.json").exists():
        settings = peft.PeftConfig.from_pretrained(directory)
        base = settings.base_model_name_or_path
        config = transformers.AutoConfig.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, config=config)
        model = peft.PeftModel.from_pretrained(model, directory)
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    model.eval()
    scores = []
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            scores.append(float(model(input_ids=ids["input_ids"]).logits[0, 0]))
    return scores
