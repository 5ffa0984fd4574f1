"""The networks of benchmarks.coverage: the smallest member of each family, with random weights and inputs."""

from typing import Any

import torch
from torch import Tensor, nn

ROWS = 4

TIMM = (
    "resnet10t", "resnet18d", "legacy_seresnet18", "mobilenetv2_035", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "efficientnet_lite0", "tf_efficientnetv2_b0", "mixnet_s", "regnetx_002",
    "regnety_002", "densenet121", "vgg11", "convnext_atto", "convnextv2_atto", "vit_tiny_patch16_224",
    "deit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "crossvit_9_240",
    "pit_ti_224", "levit_128s", "efficientformer_l1", "efficientformerv2_s0", "edgenext_xx_small", "mobilevit_xxs",
    "mobilevitv2_050", "fastvit_t8", "repvgg_a0", "rexnet_100", "ghostnet_050", "ghostnetv2_100", "hardcorenas_a",
    "dla46_c", "cspresnet50", "hrnet_w18_small", "res2net50_26w_4s", "resnest14d", "skresnet18", "xception41",
    "inception_v3", "inception_resnet_v2", "eca_nfnet_l0", "coat_tiny", "coatnet_pico_rw_224", "maxvit_tiny_tf_224",
    "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "convmixer_768_32", "poolformer_s12", "pvt_v2_b0",
    "twins_pcpvt_small", "visformer_tiny", "volo_d1_224", "davit_tiny", "focalnet_tiny_srf", "gcvit_xxtiny",
    "hiera_tiny_224", "inception_next_atto", "lcnet_050", "tinynet_e", "mnasnet_small", "selecsls42b",
    "ese_vovnet19b_dw", "tiny_vit_5m_224", "repvit_m0_9", "starnet_s1", "mambaout_femto", "nextvit_small", "halonet26t",
    "lambda_resnet26t", "botnet26t_256", "sequencer2d_s", "mvitv2_tiny", "nest_tiny",
)  # fmt: skip

TRANSFORMERS = (
    "Bert", "Roberta", "DistilBert", "Albert", "Electra", "MPNet", "XLMRoberta", "Camembert", "DebertaV2", "ModernBert",
    "GPT2", "OPT", "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Phi", "GPTNeoX", "Bloom", "T5Encoder", "ViT", "DeiT",
    "Swin", "Beit", "Dinov2", "CLIPText", "CLIPVision", "Wav2Vec2", "WhisperEncoder", "Segformer", "ConvNext",
)  # fmt: skip

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "image_size": 32, "patch_size": 8,
    "embedding_size": 32, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 64,
    "word_embed_proj_dim": 32, "pad_token_id": 0,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 32},
    "ModernBert": {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "bos_token_id": 1},
    "Swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "image_size": 32},
    "Segformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16,
                  "num_attention_heads": [1, 2, 2, 4]},
    "ConvNext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
    "Wav2Vec2": {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16,
                 "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2},
    "WhisperEncoder": {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_source_positions": 50,
                       "num_mel_bins": 16},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}  # fmt: skip
VISION = ("ViT", "DeiT", "Swin", "Beit", "Dinov2", "CLIPVision", "Segformer", "ConvNext")


def timm_model(name: str) -> tuple[nn.Module, Any]:
    """The model and random images of its own size."""
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, {"x": torch.randn(ROWS, *model.default_cfg["input_size"])}


class Hidden(nn.Module):
    """A transformers model that returns its last hidden state alone, without a cache."""

    def __init__(self, model: nn.Module, options: dict[str, Any]):
        super().__init__()
        self.model, self.options = model, options


class HiddenText(Hidden):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        state: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)[0]
        return state


def transformers_model(name: str) -> tuple[nn.Module, Any]:
    """A model from a small configuration; sentences with padding, images, waves or spectra."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    stem = {"T5Encoder": "T5", "CLIPText": "CLIPText", "CLIPVision": "CLIPVision", "WhisperEncoder": "Whisper"}.get(
        name, name
    )
    kind = getattr(transformers, f"{stem}Config")
    known = kind().to_dict()
    config = kind(**{key: value for key, value in SIZES.items() if key in known} | SPECIAL.get(name, {}))
    model = WhisperEncoder(config) if name == "WhisperEncoder" else getattr(transformers, f"{name}Model")(config)
    generator = torch.Generator().manual_seed(0)
    if name in VISION:
        side = config.image_size if hasattr(config, "image_size") else 64
        return model, {"pixel_values": torch.randn(ROWS, 3, side, side, generator=generator)}
    if name == "Wav2Vec2":
        return model, {"input_values": torch.randn(ROWS, 800, generator=generator)}
    if name == "WhisperEncoder":
        return model, {"input_features": torch.randn(ROWS, 16, 100, generator=generator)}
    ids = torch.randint(3, 128, (ROWS, 16), generator=generator)
    mask = (torch.arange(16) < torch.tensor([16, 12, 9, 16])[:, None]).long()
    decoder = getattr(config, "use_cache", None) is not None and name not in ("T5Encoder",)
    options = {"use_cache": False} if decoder and "use_cache" in model.forward.__code__.co_varnames else {}
    return HiddenText(model, options), {"input_ids": ids * mask, "attention_mask": mask}
