"""The nodes of each workflow that :mod:`templates` writes."""

from __future__ import annotations

from template_graph import Template
from template_parts import MOVING, PROMPT, checkpoint, flux, loaded, shown, wan_text


def first_try(t: Template) -> None:
    """The smallest model, whole."""
    checkpoint(
        t,
        "v1-5-pruned-emaonly-fp16.safetensors",
        "EmptyLatentImage",
        512,
        {"preset": "quality"},
        steps=20,
        cfg=7.0,
    )


def sdxl(t: Template) -> None:
    """A UNet, with a preset."""
    checkpoint(
        t,
        "sd_xl_base_1.0.safetensors",
        "EmptyLatentImage",
        1024,
        {"preset": "balanced"},
        steps=25,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    )


def sd35(t: Template) -> None:
    """A plan typed into the node."""
    custom = {"spec": "int8/fp16", "start_percent": 0.1, "layers": "*, !double.00"}
    checkpoint(
        t,
        "sd3.5_large_fp8_scaled.safetensors",
        "EmptySD3LatentImage",
        1024,
        {"preset": "custom", **{f"preset.{k}": v for k, v in custom.items()}},
        steps=28,
        cfg=4.5,
    )


def flux_fast(t: Template) -> None:
    """Four bits."""
    model, vae, sampling = flux(t)
    t.group("Sampling")
    sage = t.add("SageDiffusionAttention", model=model[0], preset="fast")
    drawn = t.add("KSampler", model=sage[0], steps=20, **sampling)
    shown(t, drawn, sage, vae[0], "Flux.1 fast")


def flux_autotune(t: Template) -> None:
    """A plan of its own."""
    model, vae, sampling = flux(t)
    t.group("Tune once, then sample")
    sage = t.add("SageDiffusionAutoTune", model=model[0], steps=20, **sampling)
    drawn = t.add("KSampler", model=sage[0], steps=20, **sampling)
    shown(t, drawn, sage, vae[0], "Flux.1 tuned")


def flux_check(t: Template) -> None:
    """What a plan costs."""
    model, vae, sampling = flux(t)
    t.group("With and without")
    sage = t.add("SageDiffusionAttention", model=model[0], preset="fast")
    check = t.add("SageDiffusionAccuracyCheck", model=sage[0], steps=20, vae=vae[0], **sampling)
    t.group("Look closely")
    t.add("ImageCompare", image_a=check[6], image_b=check[7])
    t.add("PreviewImage", "Error by layer and step", images=check[2])
    t.add("PreviewAny", "Report", source=check[3])


def flux_calibrate(t: Template) -> None:
    """A plan in steps."""
    model, _, sampling = flux(t)
    sampling.pop("seed")
    clip = t.nodes[1]
    other = t.add("CLIPTextEncode", clip=clip[0], text="a busy street market at night, neon signs")
    second = t.add("FluxGuidance", conditioning=other[0], guidance=3.5)
    t.group("Measure and plan")
    plan = t.add(
        "SageDiffusionCalibrate",
        model=model[0],
        positive_2=second[0],
        seed=1,
        steps=20,
        runs=2,
        name="flux mine",
        **sampling,
    )
    t.group("Keep and look")
    t.add("SageDiffusionSavePlan", plan=plan[0], name="flux mine", overwrite=True)
    t.add("SageDiffusionPlanPreview", plan=plan[0], model=model[0], tokens=4608)
    t.add("PreviewAny", "What is predicted", source=plan[1])


def flux_three(t: Template) -> None:
    """One prompt and seed, three specs."""
    model, vae, sampling = flux(t)
    for spec in ("int8/fp16", "int8/fp8", "int4/fp8-fast"):
        t.group(f"{spec}")
        custom = {"preset": "custom", "preset.spec": spec}
        sage = t.add("SageDiffusionAttention", spec, model=model[0], **custom)
        drawn = t.add("KSampler", model=sage[0], steps=20, **sampling)
        report = t.add("SageDiffusionReport", after=drawn[0], model=sage[0], details=False)
        image = t.add("VAEDecode", samples=report[0], vae=vae[0])
        name = spec.replace("/", " ")
        t.add("SaveImage", spec, images=image[0], filename_prefix=f"sage/three {name}")


def flux2(t: Template) -> None:
    """Rules of thumb."""
    model, clip, vae = loaded(
        t,
        "flux2_dev_fp8mixed.safetensors",
        {"clip_name": "mistral_3_small_flux2_fp8.safetensors", "type": "flux2"},
        "flux2-vae.safetensors",
    )
    t.group("Prompt and size")
    text = t.add("CLIPTextEncode", clip=clip[0], text=PROMPT)
    guided = t.add("FluxGuidance", conditioning=text[0], guidance=4.0)
    size = t.add("EmptyFlux2LatentImage", width=1024, height=1024)
    t.group("Sampling")
    sage = t.add("SageDiffusionAttention", model=model[0], preset="by model")
    guider = t.add("BasicGuider", model=sage[0], conditioning=guided[0])
    noise = t.add("RandomNoise", noise_seed=42)
    sampler = t.add("KSamplerSelect", sampler_name="euler")
    sigmas = t.add("Flux2Scheduler", steps=20, width=1024, height=1024)
    drawn = t.add(
        "SamplerCustomAdvanced",
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=size[0],
    )
    shown(t, drawn, sage, vae[0], "Flux.2")


def z_image(t: Template) -> None:
    """Few steps, a large picture."""
    model, clip, vae = loaded(
        t,
        "z_image_turbo_bf16.safetensors",
        {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"},
        "ae.safetensors",
    )
    t.group("Prompt and size")
    text = t.add("CLIPTextEncode", clip=clip[0], text=PROMPT)
    nothing = t.add("ConditioningZeroOut", conditioning=text[0])
    size = t.add("EmptySD3LatentImage", width=1536, height=1536)
    t.group("Sampling")
    sage = t.add("SageDiffusionAttention", model=model[0], preset="by model")
    shifted = t.add("ModelSamplingAuraFlow", model=sage[0], shift=3.0)
    drawn = t.add(
        "KSampler",
        model=shifted[0],
        positive=text[0],
        negative=nothing[0],
        latent_image=size[0],
        seed=42,
        steps=8,
        cfg=1.0,
        sampler_name="res_multistep",
        scheduler="simple",
    )
    shown(t, drawn, sage, vae[0], "Z-Image")


def qwen_image(t: Template) -> None:
    """A plan from a file, changed and drawn."""
    model, clip, vae = loaded(
        t,
        "qwen_image_2512_fp8_e4m3fn.safetensors",
        {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"},
        "qwen_image_vae.safetensors",
    )
    t.group("Prompt and size")
    positive = t.add("CLIPTextEncode", clip=clip[0], text=PROMPT)
    negative = t.add("CLIPTextEncode", clip=clip[0], text="blurry, low quality")
    size = t.add("EmptySD3LatentImage", width=1328, height=1328)
    t.group("The plan")
    from_file = t.add("SageDiffusionLoadPlan", file="cautious int8")
    rule = {"layers": "double.0?", "spec": "fp16"}
    changed = t.add(
        "SageDiffusionEditPlan",
        plan=from_file[0],
        change="add a rule",
        **{f"change.{k}": v for k, v in rule.items()},
    )
    t.add("SageDiffusionPlanPreview", plan=changed[0], model=model[0], tokens=6889)
    t.group("Sampling")
    sage = t.add(
        "SageDiffusionAttention",
        model=model[0],
        preset="plan input",
        **{"preset.plan": changed[0]},
    )
    shifted = t.add("ModelSamplingAuraFlow", model=sage[0], shift=3.1)
    drawn = t.add(
        "KSampler",
        model=shifted[0],
        positive=positive[0],
        negative=negative[0],
        latent_image=size[0],
        seed=42,
        steps=30,
        cfg=4.0,
        scheduler="simple",
    )
    shown(t, drawn, sage, vae[0], "Qwen-Image")


def wan21(t: Template) -> None:
    """A small video model."""
    model, clip, vae = loaded(
        t,
        "wan2.1_t2v_1.3B_fp16.safetensors",
        {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"},
        "wan_2.1_vae.safetensors",
    )
    sampling = wan_text(t, clip, 33)
    t.group("Sampling")
    sage = t.add("SageDiffusionAttention", model=model[0], preset="by model")
    drawn = t.add(
        "KSampler",
        model=sage[0],
        seed=42,
        steps=30,
        cfg=6.0,
        sampler_name="uni_pc",
        scheduler="simple",
        **sampling,
    )
    shown(t, drawn, sage, vae[0], "Wan 2.1 video")


def wan22(t: Template) -> None:
    """Two MODELs, one after the other."""
    high, clip, vae = loaded(
        t,
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"},
        "wan_2.1_vae.safetensors",
    )
    low = t.add("UNETLoader", unet_name="wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors")
    sampling = wan_text(t, clip, 81)
    latent, steps = sampling.pop("latent_image"), {"steps": 20, "cfg": 3.5, "scheduler": "simple"}
    drawn = sage = None
    for title, model, start, end in (("High noise", high, 0, 10), ("Low noise", low, 10, 10000)):
        t.group(title)
        sage = t.add("SageDiffusionAttention", title, model=model[0], preset="by model")
        shifted = t.add("ModelSamplingSD3", model=sage[0], shift=8.0)
        drawn = t.add(
            "KSamplerAdvanced",
            model=shifted[0],
            add_noise="enable" if start == 0 else "disable",
            noise_seed=42,
            latent_image=latent,
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise="enable" if start == 0 else "disable",
            **sampling,
            **steps,
        )
        latent = drawn[0]
    assert drawn is not None and sage is not None
    shown(t, drawn, sage, vae[0], "Wan 2.2 video")


def hunyuan(t: Template) -> None:
    """720p."""
    model, clip, vae = loaded(
        t,
        "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
        {
            "clip_name1": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
            "clip_name2": "byt5_small_glyphxl_fp16.safetensors",
            "type": "hunyuan_video_15",
        },
        "hunyuanvideo15_vae_fp16.safetensors",
    )
    t.group("Prompt and size")
    positive = t.add("CLIPTextEncode", clip=clip[0], text=MOVING)
    negative = t.add("CLIPTextEncode", clip=clip[0], text="")
    size = t.add("EmptyHunyuanVideo15Latent", width=1280, height=720, length=121)
    t.group("Sampling")
    sage = t.add("SageDiffusionAttention", model=model[0], preset="by model")
    shifted = t.add("ModelSamplingSD3", model=sage[0], shift=7.0)
    drawn = t.add(
        "KSampler",
        model=shifted[0],
        positive=positive[0],
        negative=negative[0],
        latent_image=size[0],
        seed=42,
        steps=20,
        cfg=6.0,
        scheduler="simple",
    )
    shown(t, drawn, sage, vae[0], "HunyuanVideo video")


def minimax(t: Template) -> None:
    """Video with sound."""
    model, clip, vae = loaded(
        t,
        "minimax_h3_fl2va_pruned_int8_convrot.safetensors",
        {"clip_name": "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors", "type": "minimax"},
        "minimax_h3_video_vae_fp16.safetensors",
    )
    sound = t.add("VAELoader", vae_name="minimax_h3_audio_vae_fp32.safetensors")
    t.group("Prompt and size")
    asked = t.add("MiniMaxH3ImageToVideo", clip=clip[0], vae=vae[0], prompt=MOVING)
    t.group("Sampling")
    sage = t.add("SageDiffusionAttention", model=model[0], preset="by model")
    guider = t.add("BasicGuider", model=sage[0], conditioning=asked[0])
    noise = t.add("RandomNoise", noise_seed=42)
    sampler = t.add("KSamplerSelect", sampler_name="res_multistep")
    sigmas = t.add("BasicScheduler", model=sage[0], scheduler="simple", steps=20)
    drawn = t.add(
        "SamplerCustomAdvanced",
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=asked[1],
    )
    t.group("Result")
    report = t.add("SageDiffusionReport", after=drawn[0], model=sage[0])
    images = t.add("VAEDecode", samples=report[0], vae=vae[0])
    heard = t.add("VAEDecodeAudio", samples=report[0], vae=sound[0])
    video = t.add("CreateVideo", images=images[0], audio=heard[0], fps=24.0)
    t.add("SaveVideo", video=video[0], filename_prefix="sage/MiniMax H3")


def ltx2(t: Template) -> None:
    """Video with sound, both halves of guidance."""
    file, frames = "ltx-2-19b-dev-fp8.safetensors", 121
    t.group("Models")
    whole = t.add("CheckpointLoaderSimple", ckpt_name=file)
    encoder = "gemma_3_12B_it_fp4_mixed.safetensors"
    clip = t.add("LTXAVTextEncoderLoader", text_encoder=encoder, ckpt_name=file)
    sound = t.add("LTXVAudioVAELoader", ckpt_name=file)
    t.group("Prompt and size")
    positive = t.add("CLIPTextEncode", clip=clip[0], text=MOVING)
    negative = t.add("CLIPTextEncode", clip=clip[0], text="blurry, still, watermark")
    asked = t.add("LTXVConditioning", positive=positive[0], negative=negative[0], frame_rate=24.0)
    seen = t.add("EmptyLTXVLatentVideo", width=1280, height=704, length=frames)
    heard = t.add("LTXVEmptyLatentAudio", audio_vae=sound[0], frames_number=frames, frame_rate=24)
    latent = t.add("LTXVConcatAVLatent", video_latent=seen[0], audio_latent=heard[0])
    t.group("Sampling")
    sage = t.add("SageDiffusionAttention", model=whole[0], preset="by model")
    guider = t.add("CFGGuider", model=sage[0], positive=asked[0], negative=asked[1], cfg=4.0)
    noise = t.add("RandomNoise", noise_seed=42)
    sampler = t.add("KSamplerSelect", sampler_name="euler_ancestral")
    sigmas = t.add("LTXVScheduler", steps=20, latent=latent[0])
    drawn = t.add(
        "SamplerCustomAdvanced",
        noise=noise[0],
        guider=guider[0],
        sampler=sampler[0],
        sigmas=sigmas[0],
        latent_image=latent[0],
    )
    t.group("Result")
    report = t.add("SageDiffusionReport", after=drawn[0], model=sage[0])
    both = t.add("LTXVSeparateAVLatent", av_latent=report[0])
    images = t.add("VAEDecode", samples=both[0], vae=whole[2])
    audio = t.add("LTXVAudioVAEDecode", samples=both[1], audio_vae=sound[0])
    video = t.add("CreateVideo", images=images[0], audio=audio[0], fps=24.0)
    t.add("SaveVideo", video=video[0], filename_prefix="sage/LTX-2")
