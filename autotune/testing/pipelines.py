"""Small real pipelines of many kinds: seeded random weights, float32, a second each on the CPU.

``BUILDERS[kind]()`` makes one, ``call(pipe)`` runs it. Nothing is downloaded: tokenizers have
vocabularies of their own, and every model is as small as its kind allows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SIDE = 64
"""Of the images and frames of a small request, in pixels."""

FRAMES = 9
"""Of the videos of a small request."""

# ---- text encoders and tokenizers ---------------------------------------------------------------

TOKENS = 16
"""How long a prompt may be, in tokens, where a kind does not fix it."""

_WORDS = ("<pad>", "</s>", "<s>", "<unk>", *(chr(c) for c in range(ord("a"), ord("z") + 1)))
_VOCABULARY = 64  # as many embeddings as any of the text encoders below has


def build_clip_tokenizer() -> Any:
    """Byte pairs of single letters, so that no vocabulary file is needed."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def build_word_tokenizer(length: int = 512) -> Any:
    """One token per word, as T5's, Gemma's, Llama's and Qwen's have about; most are unknown to it.

    Args:
        length: What it cuts and pads to, unless the pipeline says another length.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _WORDS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=length,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side="right",
    )


def build_clip(projects: bool = False, length: int = TOKENS) -> Any:
    """A CLIP text encoder, with the projection that SDXL's second and SD3's two have or without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=32,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def build_t5(width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_T5 | {"d_model": width}))


_T5: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "use_cache": False,
}

# ---- image autoencoders and denoisers that several kinds share ----------------------------------


def build_vae(levels: int = 3, **changes: Any) -> Any:
    """Halves sides once less than it has levels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": (16,) + (32,) * (levels - 1),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "latent_channels": 4,
            "sample_size": 64,
            **changes,
        }
    )


def build_flow_vae() -> Any:
    """As SD3's and Flux's: shifted latents and no convolution around them."""
    return build_vae(
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


_SD_UNET: dict[str, Any] = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,  # as in SD 1.5, diffusers reads this as the number of heads
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}

_SDXL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "cross_attention_dim": 64,
    "attention_head_dim": (2, 4),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}


def _ready(pipe: Any) -> Any:
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- Stable Diffusion ---------------------------------------------------------------------------


def build_sd() -> Any:
    """Like SD 1.5: one text encoder, cross-attention at every level of the UNet."""
    from diffusers import StableDiffusionPipeline

    return _build_sd(StableDiffusionPipeline)


def build_sd_img2img() -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return _build_sd(StableDiffusionImg2ImgPipeline)


def build_sd_inpaint() -> Any:
    """With a UNet made for inpainting: latent, mask and masked image are its nine channels."""
    from diffusers import StableDiffusionInpaintPipeline

    return _build_sd(StableDiffusionInpaintPipeline, in_channels=9)


def build_sd_controlnet() -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(1)
    shared = ("cross_attention_dim", "attention_head_dim", "block_out_channels", "layers_per_block")
    controlnet = ControlNetModel(
        **{name: _SD_UNET[name] for name in (*shared, "norm_num_groups", "down_block_types")},
        conditioning_embedding_out_channels=(16, 32, 32),  # halves twice: to the latent's size
    )
    return _build_sd(StableDiffusionControlNetPipeline, {"controlnet": controlnet})


def _build_sd(cls: Any, others: dict[str, Any] | None = None, **unet: Any) -> Any:
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    return _ready(
        cls(
            unet=UNet2DConditionModel(**_SD_UNET, **unet),
            vae=build_vae(),
            text_encoder=build_clip(),
            tokenizer=build_clip_tokenizer(),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **(others or {}),
        )
    )


def build_sd_upscale() -> Any:
    """Like the SD 2 upscaler: the small image, noised, is three more channels of the latent."""
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    pipe = StableDiffusionUpscalePipeline(
        unet=UNet2DConditionModel(
            **_SD_UNET | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")},
            in_channels=7,
            only_cross_attention=(True, False),
            num_class_embeds=1000,
        ),
        vae=build_vae(scaling_factor=0.08333),
        text_encoder=build_clip(),
        tokenizer=build_clip_tokenizer(),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        low_res_scheduler=DDPMScheduler(),
        max_noise_level=350,
    )
    return _ready(pipe)


def build_sdxl() -> Any:
    """Like SDXL: two text encoders, size conditions, no attention at the latent's resolution."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**_SDXL_UNET),
        vae=build_vae(),
        text_encoder=build_clip(),
        text_encoder_2=build_clip(projects=True),
        tokenizer=build_clip_tokenizer(),
        tokenizer_2=build_clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return _ready(pipe)


def build_sdxl_img2img() -> Any:
    """Like SDXL's refiner: only the second text encoder, and an aesthetic score for a condition."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLImg2ImgPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    refines = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 32 + 5 * 8}
    pipe = StableDiffusionXLImg2ImgPipeline(
        unet=UNet2DConditionModel(**_SDXL_UNET | refines),
        vae=build_vae(),
        text_encoder=None,
        text_encoder_2=build_clip(projects=True),
        tokenizer=None,
        tokenizer_2=build_clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    return _ready(pipe)


# ---- transformers that draw images --------------------------------------------------------------


def build_sd3() -> Any:
    """Three text encoders; text and image attend to each other."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,  # T5's width, to which both CLIPs side by side are padded
            pooled_projection_dim=64,
            pos_embed_max_size=32,
        ),
        vae=build_flow_vae(),
        text_encoder=build_clip(projects=True),
        text_encoder_2=build_clip(projects=True),
        text_encoder_3=build_t5(width=64),
        tokenizer=build_clip_tokenizer(),
        tokenizer_2=build_clip_tokenizer(),
        tokenizer_3=build_word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def build_flux() -> Any:
    """Guidance is an input, not a second sample; latents are packed two by two."""
    from diffusers import FluxPipeline

    return _build_flux(FluxPipeline)


def build_flux_img2img() -> Any:
    from diffusers import FluxImg2ImgPipeline

    return _build_flux(FluxImg2ImgPipeline)


def _build_flux(cls: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(0)
    pipe = cls(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * 4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        vae=build_flow_vae(),
        text_encoder=build_clip(),
        text_encoder_2=build_t5(),
        tokenizer=build_clip_tokenizer(),
        tokenizer_2=build_word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def build_pixart_sigma() -> Any:
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    pipe = PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            in_channels=4,
            out_channels=8,
            caption_channels=32,
            cross_attention_dim=32,
        ),
        vae=build_vae(),
        text_encoder=build_t5(),
        tokenizer=build_word_tokenizer(),
        scheduler=DDIMScheduler(),
    )
    return _ready(pipe)


def build_sana() -> Any:
    """Linear attention over an autoencoder that has no KL; Gemma reads the prompt."""
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    pipe = SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
        ),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(16, 32, 32),
            decoder_block_out_channels=(16, 32, 32),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=_VOCABULARY,
                hidden_size=32,
                head_dim=8,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                use_cache=False,
            )
        ),
        tokenizer=build_word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    return _ready(pipe)


def build_auraflow() -> Any:
    from diffusers import (
        AuraFlowPipeline,
        AuraFlowTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    pipe = AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pos_embed_max_size=256,
        ),
        vae=build_vae(),
        text_encoder=UMT5EncoderModel(UMT5Config(**_T5)),
        tokenizer=build_word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def build_hunyuandit() -> Any:
    """A Chinese BERT of 77 tokens beside a T5 of 256, both lengths fixed."""
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    pipe = HunyuanDiTPipeline(
        transformer=HunyuanDiT2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=4,
            in_channels=4,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            hidden_size=32,
            activation_fn="gelu-approximate",
        ),
        vae=build_vae(levels=4),  # the pipeline takes it for granted that sides are divided by 8
        text_encoder=BertModel(
            BertConfig(
                vocab_size=_VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
            )
        ),
        text_encoder_2=build_t5(),
        tokenizer=build_word_tokenizer(77),
        tokenizer_2=build_word_tokenizer(256),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe)


def build_qwen_image() -> Any:
    """A vision-language model reads the prompt inside a template; a video autoencoder decodes."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    reader = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": _VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": _WORDS.index("<s>"),
            "eos_token_id": _WORDS.index("</s>"),
            "use_cache": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 4,
            "out_hidden_size": 32,
        },
    )
    pipe = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(reader),
        tokenizer=build_word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def build_chroma() -> Any:
    """Like Flux with real guidance, and with modulations that one small network makes."""
    from diffusers import (
        ChromaPipeline,
        ChromaTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )

    torch.manual_seed(0)
    pipe = ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4 * 4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_hidden_dim=32,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
        vae=build_flow_vae(),
        text_encoder=build_t5(),
        tokenizer=build_word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def build_z_image() -> Any:
    """The prompt is a chat's message; samples go to the transformer as a list."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    with torch.no_grad():  # these two are left as the memory was
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    tokenizer = build_word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    pipe = ZImagePipeline(
        transformer=transformer,
        vae=build_flow_vae(),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=_VOCABULARY,
                hidden_size=32,
                head_dim=8,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                use_cache=False,
            )
        ),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


# ---- video --------------------------------------------------------------------------------------


def build_cogvideox() -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    pipe = CogVideoXPipeline(
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=TOKENS,
        ),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=4,
        ),
        text_encoder=build_t5(),
        tokenizer=build_word_tokenizer(),
        scheduler=CogVideoXDDIMScheduler(),
    )
    return _ready(pipe)


def build_ltx_video() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(0)
    pipe = LTXPipeline(
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        text_encoder=build_t5(),
        tokenizer=build_word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def build_wan() -> Any:
    """Like Wan 2.1: two calls of the transformer a step, and a decode frame by frame."""
    return _build_wan(None, None)


def build_wan22() -> Any:
    """Like Wan 2.2: one transformer for the noisy steps, another for the rest."""
    torch.manual_seed(1)
    return _build_wan(_build_wan_transformer(), 0.875)


def _build_wan(transformer_2: Any, boundary_ratio: float | None) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    pipe = WanPipeline(
        transformer=_build_wan_transformer(),
        transformer_2=transformer_2,
        boundary_ratio=boundary_ratio,
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        text_encoder=UMT5EncoderModel(UMT5Config(**_T5)),
        tokenizer=build_word_tokenizer(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    return _ready(pipe)


def _build_wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def build_hunyuanvideo() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    pipe = HunyuanVideoPipeline(
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=AutoencoderKLHunyuanVideo(
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,  # the pipeline leaves the last two out
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                use_cache=False,
            )
        ),
        text_encoder_2=build_clip(length=77),  # what the pipeline pads to
        tokenizer=build_word_tokenizer(),
        tokenizer_2=build_clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    return _ready(pipe)


def build_animatediff() -> Any:
    """SD's UNet with motion modules between its layers; frames are the batch of everything else."""
    from diffusers import (
        AnimateDiffPipeline,
        DDIMScheduler,
        MotionAdapter,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    pipe = AnimateDiffPipeline(
        unet=UNet2DConditionModel(**_SD_UNET),
        motion_adapter=MotionAdapter(
            block_out_channels=_SD_UNET["block_out_channels"],
            motion_layers_per_block=1,
            motion_mid_block_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=4,
        ),
        vae=build_vae(),
        text_encoder=build_clip(),
        tokenizer=build_clip_tokenizer(),
        scheduler=DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False),
    )
    return _ready(pipe)


def build_svd() -> Any:
    """No prompt: an image encoder and the image's latent say what to draw."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    pipe = StableVideoDiffusionPipeline(
        unet=UNetSpatioTemporalConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=32,
            num_attention_heads=(4, 8),
            projection_class_embeddings_input_dim=3 * 8,
            addition_time_embed_dim=8,
            num_frames=FRAMES,
        ),
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32),  # of 32 groups each
            down_block_types=("DownEncoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
        ),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=224,  # what the pipeline resizes to
                patch_size=32,
            )
        ),
        feature_extractor=CLIPImageProcessor(),
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction",
            interpolation_type="linear",
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_max=700.0,
            sigma_min=0.002,
        ),
    )
    return _ready(pipe)


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": build_sd,
    "sd-img2img": build_sd_img2img,
    "sd-inpaint": build_sd_inpaint,
    "sd-controlnet": build_sd_controlnet,
    "sd-upscale": build_sd_upscale,
    "sdxl": build_sdxl,
    "sdxl-img2img": build_sdxl_img2img,
    "sd3": build_sd3,
    "flux": build_flux,
    "flux-img2img": build_flux_img2img,
    "chroma": build_chroma,
    "pixart-sigma": build_pixart_sigma,
    "sana": build_sana,
    "auraflow": build_auraflow,
    "hunyuandit": build_hunyuandit,
    "qwen-image": build_qwen_image,
    "z-image": build_z_image,
    "cogvideox": build_cogvideox,
    "ltx-video": build_ltx_video,
    "wan": build_wan,
    "wan22": build_wan22,
    "hunyuanvideo": build_hunyuanvideo,
    "animatediff": build_animatediff,
    "svd": build_svd,
}

# ---- a small request for each -------------------------------------------------------------------


def build_image(side: int = SIDE, seed: int = 0) -> Any:
    """Noise as a picture."""
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def build_mask(side: int = SIDE) -> Any:
    """The left half is to be drawn anew."""
    from PIL import Image

    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side))
    return mask


def arguments(pipe: Any, side: int = SIDE) -> dict[str, Any]:
    """What a small call of this pipeline takes besides steps, seed and the kind of output.

    Args:
        pipe: One of ``BUILDERS``.
        side: Of the image or the frames that come out, in pixels: a multiple of 32.
    """
    size: dict[str, Any] = {"height": side, "width": side}
    video = {**size, "num_frames": FRAMES}
    text = {"max_sequence_length": TOKENS}
    plain = {"use_resolution_binning": False, "clean_caption": False}
    guided = {"negative_prompt": "a dog", "guidance_scale": 5.0}
    image = {"image": build_image(side), "strength": 0.5}
    by_class: dict[str, dict[str, Any]] = {
        "StableDiffusionPipeline": size,
        "StableDiffusionImg2ImgPipeline": image,
        "StableDiffusionInpaintPipeline": {**size, **image, "mask_image": build_mask(side)},
        "StableDiffusionControlNetPipeline": {**size, "image": build_image(side)},
        "StableDiffusionUpscalePipeline": {"image": build_image(side // 4)},
        "StableDiffusionXLPipeline": size,
        "StableDiffusionXLImg2ImgPipeline": image,
        "StableDiffusion3Pipeline": {**size, **text, **guided},
        "FluxPipeline": {**size, **text},
        "FluxImg2ImgPipeline": {**size, **image, **text},
        "ChromaPipeline": {**size, **text, **guided},
        "PixArtSigmaPipeline": {**size, **text, **guided, **plain},
        "SanaPipeline": {**size, **text, **guided, **plain, "complex_human_instruction": None},
        "AuraFlowPipeline": {**size, **text, **guided},
        "HunyuanDiTPipeline": {**size, "use_resolution_binning": False},
        "QwenImagePipeline": {**size, "negative_prompt": "a dog", "true_cfg_scale": 4.0},
        "ZImagePipeline": {**size, **text, **guided},
        "CogVideoXPipeline": {**video, **text, **guided},
        "LTXPipeline": {**video, **text, **guided},
        "WanPipeline": {**video, **text, **guided},
        "HunyuanVideoPipeline": {**video, **text},
        "AnimateDiffPipeline": {**video, **guided},
        "StableVideoDiffusionPipeline": {**video, "image": build_image(side)},
    }
    given = by_class[type(pipe).__name__]
    has_prompt = "prompt" in inspect.signature(pipe.__call__).parameters
    return {"prompt": "a small cat", **given} if has_prompt else given


def call(pipe: Any, steps: int = 2, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Run a pipeline, decode included.

    Args:
        pipe: One of ``BUILDERS``.
        steps: How often the scheduler steps.
        seed: Of the noise.
        changes: Arguments of the pipeline instead of ``arguments``; ``side`` as there.

    Returns:
        Images as (batch, channels, height, width), videos with frames after the batch.
    """
    given = arguments(pipe, changes.pop("side", SIDE))
    output = pipe(
        **{
            **given,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "pt",
            **changes,
        }
    )
    images: torch.Tensor = output[0]
    return images
