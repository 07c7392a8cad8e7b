"""The networks: shapes, features and layers of every family, and errors that name the encoder."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import nn

from ssad_hpo.encoder import build_network, given_weights

# ImageNet's statistics, which images are normalised by.
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_global_state():
    """Weights are drawn from torch's global generator: fixed here, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def random_images(n, channels, height, width):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1))


def check_network(network, images, features):
    """What holds for every encoder: shapes, finite values, a gradient for every weight."""
    n = len(images)
    assert network.features == features
    network.eval()
    assert network.features_of(images).shape == (n, features)
    assert network(images).shape == (n, 2)
    torch.testing.assert_close(network(images), network.head(network.features_of(images)))
    network.train()
    logits = network(images)
    assert logits.shape == (n, 2) and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(n) % 2).backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 64), (96, 40)], ids=str)
@pytest.mark.parametrize("width", [4, 8])
def test_the_small_encoder_takes_images_of_any_size_from_16_pixels_on(channels, size, width):
    network = build_network("small", channels=channels, image_size=size, width=width)
    check_network(network, random_images(4, channels, *size), 8 * width)


@pytest.mark.parametrize(
    ("encoder", "features"), [("small", 32), ("resnet18", 512), ("mobilenet_v3_small", 1024)]
)
def test_the_head_is_three_linear_layers_with_batch_norm_and_relu_between(encoder, features):
    head = build_network(encoder, channels=3, image_size=(32, 32), width=4).head
    layers = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head] == layers
    sizes = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert sizes == [(features, features), (features, 128), (128, 2)]
    assert [layer.num_features for layer in head if isinstance(layer, nn.BatchNorm1d)] == [features, 128]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("encoder", "features"), [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_a_torchvision_classifier_gives_the_features_before_its_last_layer(encoder, features, channels):
    network = build_network(encoder, channels=channels, image_size=(40, 48), width=4)
    check_network(network, random_images(4, channels, 40, 48), features)


@pytest.mark.parametrize("channels", [1, 3])
def test_resnet18_is_torchvisions_on_images_normalised_as_imagenets(channels):
    network = build_network("resnet18", channels=channels, image_size=(40, 48), width=4).eval()
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    model.fc = nn.Identity()
    images = random_images(3, channels, 40, 48)
    mean, std = (MEAN, STD) if channels == 3 else (MEAN.mean(), STD.mean())
    normalised = ((images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).expand(-1, 3, -1, -1)
    torch.testing.assert_close(network.features_of(images), model(normalised), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_encoder_sees_normalised_images(channels):
    network = build_network("small", channels=channels, image_size=(16, 16), width=4).eval()
    seen = []
    network.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    images = random_images(2, channels, 16, 16)
    network(images)
    mean, std = (MEAN, STD) if channels == 3 else (MEAN.mean(), STD.mean())
    torch.testing.assert_close(seen[0], (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_a_classifier_with_auxiliary_outputs_trains_as_well():
    network = build_network("googlenet", channels=1, image_size=(64, 64), width=4)
    network.train()
    assert network(random_images(2, 1, 64, 64)).shape == (2, 2)


def test_weights_are_drawn_from_the_global_generator():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        network = build_network("small", channels=1, image_size=(16, 16), width=4)
        weights.append(nn.utils.parameters_to_vector(network.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("encoder", ["small", "resnet18"])
def test_a_new_network_is_in_training_mode_with_untouched_statistics(encoder):
    network = build_network(encoder, channels=3, image_size=(32, 32), width=4)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert all(module.training for module in network.modules())
    assert norms and all(norm.num_batches_tracked == 0 for norm in norms)


def test_a_classifier_for_one_image_size_says_which_it_is_asked_for():
    with pytest.raises(ValueError, match=r"^encoder: 'vit_b_16' cannot take images of 32x40 pixels"):
        build_network("vit_b_16", channels=3, image_size=(32, 40), width=4)


def test_a_classifier_without_a_linear_layer_is_rejected_by_name():
    with pytest.raises(ValueError, match=r"^encoder: 'squeezenet1_1' has no last linear layer"):
        build_network("squeezenet1_1", channels=3, image_size=(64, 64), width=4)


@pytest.mark.parametrize("name", ["resnet19", "", "fcn_resnet50", "fasterrcnn_resnet50_fpn"])
def test_a_name_that_is_no_classifier_is_rejected(name):
    with pytest.raises(
        ValueError, match=rf"^encoder: expected 'small' or a torchvision .*, got '{name}'($|; the nearest )"
    ):
        build_network(name, channels=3, image_size=(32, 32), width=4)


def test_given_weights_are_those_of_one_thread_for_as_long_as_they_are_given(tmp_path):
    name, file = "mobilenet_v3_small", tmp_path / "weights.pt"
    own, others = (torchvision.models.get_model(name).state_dict() for _ in range(2))
    torch.save(own, file)

    def begins_with(tensors):
        network = build_network(name, channels=1, image_size=(32, 32), width=4, weights=str(file))
        found = network.encoder.model.state_dict()
        return all(torch.equal(tensor, tensors[key]) for key, tensor in found.items())

    with given_weights(name, str(file), others), ThreadPoolExecutor(1) as pool:
        assert begins_with(others)
        assert pool.submit(begins_with, own).result()
    assert begins_with(own)
