"""Models built on the operators, with the published models' parameter names.

With timm the published variants are also ``timm.create_model("tersor_dilateformer_tiny")`` and so on: they register
themselves if timm was imported before this package, else call :func:`register_timm`. timm itself is never imported
here unasked, as that takes seconds.
"""

import sys

from tersor.models._classification import load_by_position
from tersor.models._super_resolution import attention_transfer, load_full_precision
from tersor.models._timm import register_timm
from tersor.models._tokens import token_label_loss
from tersor.models.binary_resnet import (
    resnet18_cifar_recu,
    resnet18_cifar_reste,
    resnet18_recu,
    resnet18_recu_two_stage,
    resnet18_reste,
    resnet20_bireal_reste,
    resnet20_recu,
    resnet20_reste,
    resnet34_recu,
    resnet34_recu_two_stage,
    resnet34_reste,
)
from tersor.models.cf_vit import (
    CFLVViT,
    CFViT,
    cf_deit_nano,
    cf_deit_small,
    cf_lvvit_loss,
    cf_lvvit_small,
    cf_vit_loss,
)
from tersor.models.deit import DeiT, deit_small, deit_small_nm, deit_tiny, deit_tiny_nm
from tersor.models.dilateformer import (
    DilateFormer,
    dilateformer_base,
    dilateformer_nano,
    dilateformer_small,
    dilateformer_tiny,
)
from tersor.models.edsr import EDSR, edsr_baseline, edsr_tiny
from tersor.models.layers import load_checkpoint
from tersor.models.mobilenet import MobileNet, mobilenet_v1, mobilenet_v1_quant, mobilenet_v2, mobilenet_v2_quant
from tersor.models.pslt import PSLT, PSLTBackbone, pslt_backbone, pslt_base, pslt_large, pslt_tiny
from tersor.models.rdn import RDN, rdn_a, rdn_b, rdn_tiny
from tersor.models.resnet import (
    ResNet,
    resnet18,
    resnet18_nm,
    resnet18_quant,
    resnet20,
    resnet20_quant,
    resnet50,
    resnet50_nm,
    resnet50_quant,
)
from tersor.models.srresnet import SRResNet, srresnet, srresnet_tiny
from tersor.models.super_vit import (
    SuperLVViT,
    SuperViT,
    draw_subnetworks,
    subnetwork_losses,
    super_deit_nano,
    super_deit_small,
    super_lvvit_small,
)
from tersor.models.uformer import (
    Uformer,
    charbonnier_loss,
    pad_and_run,
    uformer_base,
    uformer_nano,
    uformer_small,
    uformer_small_noshift,
    uformer_tiny,
)
from tersor.models.vgg_small import VGGSmall, vgg_small_recu, vgg_small_reste

__all__ = [
    "EDSR",
    "PSLT",
    "RDN",
    "CFLVViT",
    "CFViT",
    "DeiT",
    "DilateFormer",
    "MobileNet",
    "PSLTBackbone",
    "ResNet",
    "SRResNet",
    "SuperLVViT",
    "SuperViT",
    "Uformer",
    "VGGSmall",
    "attention_transfer",
    "cf_deit_nano",
    "cf_deit_small",
    "cf_lvvit_loss",
    "cf_lvvit_small",
    "cf_vit_loss",
    "charbonnier_loss",
    "deit_small",
    "deit_small_nm",
    "deit_tiny",
    "deit_tiny_nm",
    "dilateformer_base",
    "dilateformer_nano",
    "dilateformer_small",
    "dilateformer_tiny",
    "draw_subnetworks",
    "edsr_baseline",
    "edsr_tiny",
    "load_by_position",
    "load_checkpoint",
    "load_full_precision",
    "mobilenet_v1",
    "mobilenet_v1_quant",
    "mobilenet_v2",
    "mobilenet_v2_quant",
    "pad_and_run",
    "pslt_backbone",
    "pslt_base",
    "pslt_large",
    "pslt_tiny",
    "rdn_a",
    "rdn_b",
    "rdn_tiny",
    "register_timm",
    "resnet18",
    "resnet18_cifar_recu",
    "resnet18_cifar_reste",
    "resnet18_nm",
    "resnet18_quant",
    "resnet18_recu",
    "resnet18_recu_two_stage",
    "resnet18_reste",
    "resnet20",
    "resnet20_bireal_reste",
    "resnet20_quant",
    "resnet20_recu",
    "resnet20_reste",
    "resnet34_recu",
    "resnet34_recu_two_stage",
    "resnet34_reste",
    "resnet50",
    "resnet50_nm",
    "resnet50_quant",
    "srresnet",
    "srresnet_tiny",
    "subnetwork_losses",
    "super_deit_nano",
    "super_deit_small",
    "super_lvvit_small",
    "token_label_loss",
    "uformer_base",
    "uformer_nano",
    "uformer_small",
    "uformer_small_noshift",
    "uformer_tiny",
    "vgg_small_recu",
    "vgg_small_reste",
]

if "timm" in sys.modules:
    register_timm()
