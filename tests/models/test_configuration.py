"""Configurations: defaults, named sizes, checks, typos, and the way to disk and back."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_models import BACKBONES, tiny_config
from transformers import AutoConfig

from solarchip_hf import FLARE_CLASSES, MODALITY_NAMES, SolarChipCNNConfig, SolarChipConfig, SolarChipViTConfig


def test_defaults_are_the_published_vit():
    config = SolarChipConfig()
    backbone = config.backbone_config
    assert backbone.model_type == "solarchip_vit"
    assert (backbone.image_size, backbone.patch_size, backbone.hidden_size) == (1024, 64, 768)
    assert (backbone.num_hidden_layers, backbone.num_attention_heads, backbone.intermediate_size) == (12, 12, 3072)
    assert (backbone.num_channels, backbone.hidden_act, backbone.layer_norm_eps) == (1, "quick_gelu", 1e-5)
    assert config.projection_dim == 768
    assert config.modalities == list(MODALITY_NAMES)
    assert (config.weight_sharing, config.anchor_modality, config.pairing) == ("instrument", "hmi", "anchor")
    assert (config.cls_loss_weight, config.patch_loss_weight, config.intra_loss_weight) == (0.05, 0.001, 0.0001)
    assert math.isclose(config.logit_scale_init_value, math.log(1 / 0.07))
    assert config.id2label == dict(enumerate(FLARE_CLASSES))
    assert (config.gather_negatives, config.use_modality_embedding, config.min_disk_fraction) == (True, True, 0.25)


def test_published_cnn():
    config = SolarChipConfig.from_name("cnn-base")
    backbone = config.backbone_config
    assert backbone.block_out_channels == [32, 32, 32, 64, 64, 64]
    assert (backbone.layers_per_block, backbone.latent_channels, backbone.patch_size) == (2, 32, 32)
    assert (backbone.double_z, config.projection_dim, config.hidden_size) == (False, 32, 32)
    assert (config.cls_loss_weight, config.patch_loss_weight, config.intra_loss_weight) == (0.01, 0.0001, 0.0001)


@pytest.mark.parametrize("name", ["vit-tiny", "vit-small", "vit-base", "vit-large", "cnn-base"])
def test_named_sizes_print_and_survive_a_round_trip(name, tmp_path):
    config = SolarChipConfig.from_name(name, modalities=["HMI", "0171"])
    assert config.backbone_config.model_type in str(config)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SolarChipConfig
    assert type(again.backbone_config) is type(config.backbone_config)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_from_name_puts_overrides_where_they_belong():
    config = SolarChipConfig.from_name("vit-tiny", image_size=256, modalities=["171"], num_labels=2, ordinal=True)
    assert (config.image_size, config.backbone_config.image_size, config.patch_size) == (256, 256, 16)
    assert config.modalities == ["aia171"]
    assert (config.num_labels, config.ordinal) == (2, True)
    config = SolarChipConfig.from_name("cnn-base", backbone_config={"double_z": True}, latent_channels=16)
    assert (config.backbone_config.double_z, config.backbone_config.latent_channels) == (True, 16)


@pytest.mark.parametrize("labels", [2, 3, 4])
def test_the_number_of_labels_survives_a_round_trip(labels, tmp_path):
    SolarChipConfig.from_name("vit-tiny", num_labels=labels).save_pretrained(tmp_path)
    assert SolarChipConfig.from_pretrained(tmp_path).num_labels == labels


def test_named_sizes_are_not_shared_between_configurations():
    SolarChipConfig.from_name("vit-tiny").backbone_config.hidden_size = 64
    assert SolarChipConfig.from_name("vit-tiny").hidden_size == 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modalitis": ["hmi"]}, "'modalitis'. Did you mean 'modalities'"),
        ({"projection_dims": 3}, "Did you mean 'projection_dim'"),
        ({"cls_weight": 1.0}, "'cls_weight'"),
        ({"image_size": 64}, "expected inside backbone_config"),
        ({"backbone_config": {"patchsize": 8}}, "Did you mean 'patch_size'"),
        ({"backbone_config": {"model_type": "solarchip_cnn", "latent_channel": 8}}, "Did you mean 'latent_channels'"),
        ({"backbone_config": {"model_type": "vit"}}, "expected a model_type of solarchip_vit, solarchip_cnn"),
    ],
)
def test_typos_are_noticed(fields, message):
    with pytest.raises(ValueError, match=message):
        SolarChipConfig(**fields)


def test_from_name_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="expected one of vit-tiny"):
        SolarChipConfig.from_name("vit-huge")
    with pytest.raises(ValueError, match="Did you mean 'patch_size'"):
        SolarChipConfig.from_name("vit-tiny", patch=8)


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": []},
        {"modalities": ["171", "aia171"]},
        {"weight_sharing": "instruments"},
        {"use_modality_embedding": "yes"},
        {"projection_dim": 0},
        {"projection_dim": 7.5},
        {"projection_centering": "batch"},
        {"centering_momentum": 0.0},
        {"anchor_modality": 3.5},
        {"pairing": "some"},
        {"min_disk_fraction": 1.5},
        {"mask_reconstruction": 2},
        {"gather_negatives": None},
        {"logit_scale_init_value": math.inf},
        {"reconstruction_loss": "l3"},
        {"cls_loss_weight": -1.0},
        {"patch_loss_weight": math.nan},
        {"intra_loss_weight": "0.1"},
        {"reconstruction_loss_weight": -0.1},
        {"kl_loss_weight": -0.1},
        {"classifier_hidden_size": 0},
        {"classifier_dropout": 1.0},
        {"class_weights": [1.0, 2.0]},
        {"class_weights": [0.0, 0.0, 0.0, 0.0]},
        {"focal_gamma": -2.0},
        {"ordinal": "ordered"},
        {"classifier_head": "deep"},
        {"calibration": {"method": "beta"}},
        {"forecast_window": {"horizon": "soon"}},
    ],
)
def test_every_field_is_checked(fields):
    tiny_config()  # the base is sound
    with pytest.raises((StrictDataclassError, ValueError)):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("backbone", "fields"),
    [
        ("vit", {"image_size": 33}),
        ("vit", {"image_size": [32, 32]}),
        ("vit", {"patch_size": 0}),
        ("vit", {"hidden_size": 31}),
        ("vit", {"intermediate_size": 0}),
        ("vit", {"num_hidden_layers": -1}),
        ("vit", {"num_attention_heads": 3}),
        ("vit", {"num_channels": 3}),
        ("vit", {"hidden_act": 5}),
        ("vit", {"layer_norm_eps": 0.0}),
        ("vit", {"attention_dropout": 1.0}),
        ("vit", {"initializer_range": 0.0}),
        ("vit", {"initializer_factor": -1.0}),
        ("vit", {"decoder_hidden_size": 33}),
        ("vit", {"decoder_intermediate_size": 0}),
        ("vit", {"decoder_num_hidden_layers": -1}),
        ("vit", {"decoder_num_attention_heads": 5}),
        ("vit", {"hidden_act": "no_such_activation"}),
        ("vit", {"decoder_hidden_size": 34, "decoder_position_embedding": True}),
        ("vit", {"decoder_layout": "rows"}),
        ("cnn", {"image_size": 30}),
        ("cnn", {"num_channels": 2}),
        ("cnn", {"block_out_channels": []}),
        ("cnn", {"block_out_channels": [6]}),
        ("cnn", {"layers_per_block": 0}),
        ("cnn", {"latent_channels": 0}),
        ("cnn", {"norm_num_groups": 0}),
        ("cnn", {"norm_min_channels": 0}),
        ("cnn", {"hidden_act": None}),
        ("cnn", {"double_z": "yes"}),
        ("cnn", {"mid_block_add_attention": 1.0}),
    ],
)
def test_every_backbone_field_is_checked(backbone, fields):
    with pytest.raises((StrictDataclassError, ValueError)):
        tiny_config(backbone, fields)


def test_the_tests_above_miss_no_field():
    """Every field of ours stands in one of the two lists of refusals."""
    marks = [*test_every_field_is_checked.pytestmark, *test_every_backbone_field_is_checked.pytestmark]
    top, backbones = (mark.args[1] for mark in marks)
    refused = {
        SolarChipConfig: {name for fields in top for name in fields} | {"backbone_config"},
        SolarChipViTConfig: {name for kind, fields in backbones if kind == "vit" for name in fields},
        SolarChipCNNConfig: {name for kind, fields in backbones if kind == "cnn" for name in fields},
    }
    for config_class, names in refused.items():
        ours = set(config_class.__annotations__)
        assert ours == names, config_class.__name__


@pytest.mark.parametrize(
    ("sharing", "towers"),
    [
        ("instrument", {"hmi": ["hmi"], "aia": ["aia171", "aia304"]}),
        ("modality", {"hmi": ["hmi"], "aia171": ["aia171"], "aia304": ["aia304"]}),
        ("shared", {"shared": ["hmi", "aia171", "aia304"]}),
    ],
)
def test_towers(sharing, towers):
    config = tiny_config(weight_sharing=sharing)
    assert config.towers() == towers
    assert [config.embeds_modality(tower) for tower in towers] == [tower in ("aia", "shared") for tower in towers]
    assert not any(tiny_config(weight_sharing=sharing, use_modality_embedding=False).embeds_modality(t) for t in towers)


def test_modalities_of_a_saved_configuration_can_be_selected_but_not_added(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert SolarChipConfig.from_pretrained(tmp_path, modalities=["304"]).modalities == ["aia304"]
    with pytest.raises(ValueError, match="what the checkpoint holds"):
        SolarChipConfig.from_pretrained(tmp_path, modalities=["94"])
    with pytest.raises(ValueError, match="expected a list of names, got the text 'hmi'"):
        SolarChipConfig.from_pretrained(tmp_path, modalities="hmi")


def test_backbone_may_be_given_as_config_or_dict():
    for name, fields in BACKBONES.items():
        built = tiny_config(name).backbone_config
        assert SolarChipConfig(backbone_config=built).backbone_config is built
        assert built.model_type == fields["model_type"]
    assert SolarChipConfig(backbone_config={"hidden_size": 96}).backbone_config.model_type == "solarchip_vit"
