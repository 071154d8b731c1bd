"""A word-level tokenizer for the synthetic stories, used by the randomly initialised test models."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from wlora.data.synthetic.story import vocabulary

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a lower-casing word tokenizer with the format `[CLS] first [SEP] second [SEP]`.

    Every family's head can read this format.

    `[CLS]` is also the beginning-of-sequence token and `[SEP]` the end-of-sequence token, as BART's classification head
    needs.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = list(_SPECIAL.values()) + vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **_SPECIAL,
    )
