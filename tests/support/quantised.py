"""Layers that libraries have quantised, and their weights dequantised."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

SIZE = 64  # of a block of bitsandbytes


def dynamic(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantize_dynamic is deprecated
        (layer,) = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear))
    return layer, layer.weight().dequantize()


def int8(linear):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig(version=2)  # torchao 0.17 has 1 by default
    quantization.quantize_(linear, config)
    return linear, linear.weight.dequantize()


def four_bits(linear, **keywords):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, **keywords)
    layer.load_state_dict(linear.state_dict())
    layer.to("cpu").support_avx512bf16_for_cpu = False  # or evaluation would pack the weight
    weight = layer.weight
    return layer, bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def eight_bits(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = linear.in_features, linear.out_features
    layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    layer.to("cpu")
    return layer, layer.weight.data * layer.weight.SCB[:, None] / 127


QUANTISE = {
    "torch.ao, dynamic int8": dynamic,
    "torchao, int8": int8,
    "bitsandbytes, 4 bits": partial(four_bits, quant_type="nf4", compress_statistics=True),
    "bitsandbytes, 4 bits, other": partial(four_bits, quant_type="fp4", compress_statistics=False),
    "bitsandbytes, 4 bits in float32": partial(four_bits, quant_storage=torch.float32),
    "bitsandbytes, 8 bits": eight_bits,
}
