"""Every augmentation against a slow per-pixel reference; sizes, places, gradients, fit, and the jitter."""

import itertools
import math

import pytest
import torch
import torchvision.transforms.functional as reference

from ssad_hpo.augment import (
    KINDS,
    Hyperparameter,
    Kind,
    apply,
    augment,
    check_fits,
    draw_noise,
    hyperparameter_of,
    jitter,
)
from ssad_hpo.task import Augmentation, Range

DEFAULT_RANGES = {kind: {n: h.range for n, h in row.hyperparameters.items()} for kind, row in KINDS.items()}
STATIC = {
    "cutout": {"patch_area": 0.1, "patch_aspect": 1.5},
    "cutavg": {"patch_area": 0.1, "patch_aspect": 1.5},
    "cutpaste": {"patch_area": 0.1, "patch_aspect": 1.5, "angle": 20.0},
    "cutdiff": {"patch_area": 0.1, "patch_aspect": 1.5},
    "rotation": {"angle": 30.0},
}
PATCHES = ("cutout", "cutavg", "cutpaste")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
every_kind = pytest.mark.parametrize("kind", DEFAULT_RANGES)
every_patch = pytest.mark.parametrize("kind", PATCHES)
every_form = pytest.mark.parametrize("form", [STATIC, DEFAULT_RANGES], ids=["static", "dynamic"])
every_device = pytest.mark.parametrize("device", DEVICES)
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def random_images(n=3, channels=3, height=24, width=20, dtype=torch.float64, seed=0):
    """Away from 0 and 1, where clamping bends the gradient."""
    return 0.3 + 0.4 * torch.rand(n, channels, height, width, generator=seeded(seed), dtype=dtype)


# The reference: plain numbers, one pixel at a time. Noise: area, aspect, angle, sign, centre, source.


def drawn(hyperparameter, u):
    if not isinstance(hyperparameter, Range):
        return hyperparameter
    low, high = hyperparameter.low, hyperparameter.high
    if hyperparameter.log:
        return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    return low + u * (high - low)


def bilinear(channel, x, y):
    """The value at a point in pixels from the upper left corner; beyond the border its pixels go on."""
    height, width = len(channel), len(channel[0])
    column, row = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    left, top = int(column), int(row)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    s, t = column - left, row - top
    upper = (1 - s) * channel[top][left] + s * channel[top][right]
    lower = (1 - s) * channel[bottom][left] + s * channel[bottom][right]
    return (1 - t) * upper + t * lower


def reflected(position, size):
    position = abs(position) % (2 * size)
    return 2 * size - position if position > size else position


def slow_augment(image, kind, hyperparameters, noise):
    """One image (C, H, W) as nested lists, changed as each kind is defined."""
    height, width = len(image[0]), len(image[0][0])
    u_area, u_aspect, u_angle, u_sign, u_x, u_y, u_source_x, u_source_y = noise
    angle = math.radians(drawn(hyperparameters.get("angle", 0.0), u_angle))
    points = [(i, j, j + 0.5, i + 0.5) for i in range(height) for j in range(width)]
    out = [[list(row) for row in channel] for channel in image]

    if kind == "rotation":
        angle = angle if u_sign >= 0.5 else -angle
        for i, j, x, y in points:
            dx, dy = x - width / 2, y - height / 2
            from_x = reflected(dx * math.cos(angle) - dy * math.sin(angle) + width / 2, width)
            from_y = reflected(dx * math.sin(angle) + dy * math.cos(angle) + height / 2, height)
            for c, channel in enumerate(image):
                out[c][i][j] = bilinear(channel, from_x, from_y)
        return out

    area, aspect = (
        drawn(hyperparameters["patch_area"], u_area),
        drawn(hyperparameters["patch_aspect"], u_aspect),
    )
    w, h = math.sqrt(area * aspect) * width, math.sqrt(area / aspect) * height
    if kind == "cutdiff":
        for i, j, x, y in points:
            distance = ((x - u_x * width) / w) ** 2 + ((y - u_y * height) / h) ** 2
            for c, channel in enumerate(image):
                out[c][i][j] = min(max(channel[i][j] - math.exp(-distance / 0.2), 0.0), 1.0)
        return out

    box_w = w * abs(math.cos(angle)) + h * abs(math.sin(angle))
    box_h = w * abs(math.sin(angle)) + h * abs(math.cos(angle))
    centre_x, centre_y = box_w / 2 + u_x * (width - box_w), box_h / 2 + u_y * (height - box_h)
    inside = {}  # pixel -> where it lies in the upright patch, from its centre
    for i, j, x, y in points:
        dx, dy = x - centre_x, y - centre_y
        along, across = (
            dx * math.cos(angle) - dy * math.sin(angle),
            dx * math.sin(angle) + dy * math.cos(angle),
        )
        if abs(along) < w / 2 and abs(across) < h / 2:
            inside[i, j] = along, across

    def source(centre, size, whole, u):
        """A place for the upright patch, a whole number of pixels away and inside the image."""
        places = [centre + shift for shift in range(-whole, whole + 1)]
        places = [place for place in places if place - size / 2 >= 0 and place + size / 2 <= whole]
        return places[int(u * len(places))]

    average = sum(channel[i][j] for channel in image for i, j in inside) / max(len(inside) * len(image), 1)
    for c, channel in enumerate(image):
        for (i, j), (along, across) in inside.items():
            if kind == "cutout":
                out[c][i][j] = 0.0
            elif kind == "cutavg":
                out[c][i][j] = average
            else:
                from_x = source(centre_x, w, width, u_source_x) + along
                from_y = source(centre_y, h, height, u_source_y) + across
                out[c][i][j] = bilinear(channel, from_x, from_y)
    return out


@every_kind
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"patch_area": 0.03},
        {"patch_area": 0.3, "patch_aspect": 0.6},
        {"angle": 0.0},
        {"angle": -70.0},
        "ranges",
    ],
    ids=str,
)
def test_an_augmentation_agrees_with_the_slow_reference(kind, channels, changed):
    if changed == "ranges":
        hyperparameters = DEFAULT_RANGES[kind]
    else:
        hyperparameters = STATIC[kind] | {n: v for n, v in changed.items() if n in STATIC[kind]}
    images = random_images(channels=channels, height=17, width=17)
    noise = draw_noise(len(images), seeded(1), images)
    expected = [
        slow_augment(i.tolist(), kind, hyperparameters, u.tolist())
        for i, u in zip(images, noise, strict=True)
    ]
    torch.testing.assert_close(apply(images, kind, hyperparameters, noise), images.new_tensor(expected))


@every_kind
@pytest.mark.parametrize(("height", "width"), [(12, 23), (23, 12)])
def test_an_augmentation_of_oblong_images_agrees_with_the_slow_reference(kind, height, width):
    images = random_images(6, 1, height, width)
    noise = draw_noise(len(images), seeded(2), images)
    expected = [
        slow_augment(i.tolist(), kind, STATIC[kind], u.tolist()) for i, u in zip(images, noise, strict=True)
    ]
    torch.testing.assert_close(apply(images, kind, STATIC[kind], noise), images.new_tensor(expected))


# What all have in common


@every_kind
@every_form
@every_type
@every_device
@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (4, 1, 32, 28), (1, 3, 33, 33)], ids=str)
def test_an_augmentation_keeps_shape_range_type_and_device_and_draws_from_its_seed(
    kind, form, dtype, device, shape
):
    images = torch.rand(shape, generator=seeded(0)).to(device, dtype)
    original, global_state = images.clone(), torch.get_rng_state()
    augmentation = Augmentation(kind, form[kind] | ({"patch_area": 0.05} if kind == "cutpaste" else {}))
    out = augment(images, augmentation, seeded(1))
    assert out.shape == images.shape and out.dtype == dtype and out.device == images.device
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    assert not torch.equal(out, images)
    assert torch.equal(out, augment(images, augmentation, seeded(1)))
    assert not torch.equal(out, augment(images, augmentation, seeded(2)))
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), global_state)


@every_kind
@pytest.mark.parametrize("grey", [0.0, 1.0], ids=["black", "white"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@every_type
def test_an_augmentation_stays_in_range_at_its_ends(kind, grey, temperature, dtype):
    images = torch.full((64, 3, 33, 33), grey, dtype=dtype)
    noise = draw_noise(len(images), seeded(3), images)
    out = apply(images, kind, DEFAULT_RANGES[kind], noise, temperature)
    assert out.min() >= 0 and out.max() <= 1


@every_kind
@every_form
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_image_is_augmented_on_its_own(kind, form, temperature):
    images = random_images(4)
    noise = draw_noise(4, seeded(4), images)
    together = apply(images, kind, form[kind], noise, temperature)
    for i in range(4):
        alone = apply(images[i : i + 1], kind, form[kind], noise[i : i + 1], temperature)
        torch.testing.assert_close(together[i : i + 1], alone)
    equal = images[:1].expand_as(images)
    changed = apply(equal, kind, form[kind], noise, temperature) - equal
    # Two of four have one sign of rotation; nothing else can be the same twice.
    assert len(changed.flatten(1).unique(dim=0)) == (2 if (kind, form) == ("rotation", STATIC) else 4)


def test_the_noise_is_uniform_and_its_amount_does_not_depend_on_the_augmentation():
    noise = draw_noise(20_000, seeded(5), torch.zeros(1))
    assert noise.shape == (20_000, 8) and noise.min() >= 0 and noise.max() < 1
    torch.testing.assert_close(
        noise.quantile(torch.linspace(0.1, 0.9, 9), dim=0),
        torch.linspace(0.1, 0.9, 9)[:, None].expand(9, 8),
        atol=0.02,
        rtol=0,
    )
    assert noise.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03
    states = []
    for kind, form in itertools.product(DEFAULT_RANGES, (STATIC, DEFAULT_RANGES)):
        generator = seeded(6)
        augment(random_images(height=64, width=64), Augmentation(kind, form[kind]), generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@every_kind
def test_a_hyperparameter_may_be_a_number_or_a_tensor_for_all_or_for_each_image(kind):
    images = random_images()
    noise = draw_noise(3, seeded(7), images)
    expected = apply(images, kind, STATIC[kind], noise)
    for shape in ((), (3,)):
        tensors = {name: torch.full(shape, value, dtype=images.dtype) for name, value in STATIC[kind].items()}
        assert torch.equal(apply(images, kind, tensors, noise), expected)


@pytest.mark.parametrize("broken", [random_images()[0], (255 * random_images()).byte()], ids=["3-D", "uint8"])
def test_images_that_are_no_batch_of_floats_are_rejected(broken):
    named = rf"^images: expected \(N, C, H, W\) floats in \[0, 1\], got {broken.dtype}"
    with pytest.raises(ValueError, match=named):
        augment(broken, Augmentation("cutdiff"), seeded(0))
    with pytest.raises(ValueError, match=named):
        jitter(broken, 0.1, seeded(0))


# Sizes and places


def changed_pixels(kind, hyperparameters, n=400, height=64, width=64):
    images = random_images(n, 1, height, width)
    change = augment(images, Augmentation(kind, hyperparameters), seeded(8)) - images
    return change[:, 0].abs() > 1e-9  # a patch that CutPaste copies onto itself may be off by rounding


def comes_near_all_borders(patch):
    seen = patch.any(0)
    return seen.any(0)[[1, -2]].all() and seen.any(1)[[1, -2]].all()


@every_patch
@pytest.mark.parametrize(
    ("area", "aspect", "height", "width"),
    [(0.02, 1.0, 64, 64), (0.25, 0.4, 64, 64), (0.1, 2.5, 64, 64), (0.1, 2.5, 48, 80), (0.02, 0.4, 80, 48)],
)
def test_an_upright_patch_has_its_area_and_aspect_and_lies_inside(kind, area, aspect, height, width):
    angle = {"angle": 0.0} if kind == "cutpaste" else {}
    patch = changed_pixels(kind, {"patch_area": area, "patch_aspect": aspect} | angle, 400, height, width)
    assert comes_near_all_borders(patch)
    patch = patch[patch.flatten(1).any(1)]
    assert len(patch) > 390
    rows, columns = patch.any(2).sum(1).double(), patch.any(1).sum(1).double()
    w, h = math.sqrt(area * aspect) * width, math.sqrt(area / aspect) * height
    # Whole and in one piece: cut at no border, it holds as many pixel centres as its sides are long.
    assert (patch.flatten(1).sum(1) == rows * columns).all()
    assert ((columns - w).abs() < 1).all() and ((rows - h).abs() < 1).all()
    assert columns.mean().item() == pytest.approx(w, rel=0.03)
    assert rows.mean().item() == pytest.approx(h, rel=0.03)
    assert patch.double().mean().item() == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("angle", [-45.0, 20.0, 70.0, 90.0, Range(-45.0, 45.0)], ids=str)
def test_a_rotated_patch_has_its_area_and_lies_inside(angle):
    patch = changed_pixels("cutpaste", {"patch_area": 0.1, "patch_aspect": 2.0, "angle": angle})
    assert comes_near_all_borders(patch)
    areas = patch.double().mean((1, 2))
    assert areas.mean().item() == pytest.approx(0.1, rel=0.02)
    assert areas.min() > 0.093 and areas.max() < 0.107  # one that a border cuts would lose more


@pytest.mark.parametrize("kind", ["cutout", "cutavg"])
def test_sizes_drawn_from_a_range_are_log_uniform(kind):
    patch = changed_pixels(kind, {"patch_area": Range(0.02, 0.2, log=True), "patch_aspect": 1.0}, n=2000)
    areas = patch.double().mean((1, 2)).log10()
    quantiles = areas.quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    expected = torch.linspace(math.log10(0.02), math.log10(0.2), 5)[1:4].double()
    torch.testing.assert_close(quantiles, expected, atol=0.03, rtol=0)


def test_cutout_paints_black_and_cutavg_the_mean_of_patch_and_channels():
    images = random_images(20)
    noise = draw_noise(20, seeded(9), images)
    black = apply(images, "cutout", STATIC["cutout"], noise)
    filled = apply(images, "cutavg", STATIC["cutavg"], noise)
    for image, dark, flat in zip(images, black, filled, strict=True):
        inside = (dark == 0).all(0)
        assert torch.equal(dark[:, ~inside], image[:, ~inside]) and torch.equal(
            flat[:, ~inside], image[:, ~inside]
        )
        torch.testing.assert_close(flat[:, inside], image[:, inside].mean().expand(3, int(inside.sum())))


def test_an_upright_patch_is_copied_without_blur_from_inside_the_image():
    height, width = 20, 30
    # Every pixel tells its own place, so that it can be seen where a copy came from.
    places = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width) / (height * width)
    images = places.expand(300, -1, -1, -1)
    out = augment(images, Augmentation("cutpaste", STATIC["cutpaste"] | {"angle": 0.0}), seeded(10))
    shifts = set()
    for image in out[:, 0]:
        found = (image * height * width).round().long()
        assert (image * height * width - found).abs().max() < 1e-9
        rows, columns = (image != places[0, 0]).nonzero().unbind(1)
        moved = {
            (value // width - row, value % width - column)
            for row, column, value in zip(
                rows.tolist(), columns.tolist(), found[rows, columns].tolist(), strict=True
            )
        }
        assert len(moved) <= 1  # all of a patch moves alike
        shifts |= moved
    assert len(shifts) > 150
    assert max(row for row, _ in shifts) > 8 > -8 > min(row for row, _ in shifts)
    assert max(column for _, column in shifts) > 12 > -12 > min(column for _, column in shifts)


def test_cutdiff_is_darkest_at_its_centre_which_lies_anywhere_in_the_image():
    images = torch.ones(2000, 1, 16, 16)
    out = augment(images, Augmentation("cutdiff", {"patch_area": 0.02, "patch_aspect": 1.0}), seeded(11))
    darkest = out.flatten(1).argmin(1)
    counts = torch.bincount(darkest, minlength=256)
    assert counts.min() > 0  # some 8 of each
    centre = torch.stack([darkest // 16, darkest % 16]).double().mean(1)
    torch.testing.assert_close(centre, torch.full((2,), 7.5).double(), atol=0.4, rtol=0)


def test_rotation_by_half_a_turn_flips_both_axes():
    images = random_images()
    out = augment(images, Augmentation("rotation", {"angle": 180.0}), seeded(12))
    torch.testing.assert_close(out, images.flip(2, 3))


def test_rotation_by_a_quarter_turns_either_way():
    images = random_images(40, height=24, width=24)
    noise = draw_noise(40, seeded(13), images)
    out = apply(images, "rotation", {"angle": 90.0}, noise)
    turns = []
    for image, turned in zip(images, out, strict=True):
        distances = {k: (turned - image.rot90(k, (1, 2))).abs().max().item() for k in (-1, 1)}
        turns.append(min(distances, key=distances.get))
        assert distances[turns[-1]] < 1e-9
    assert 10 < turns.count(1) < 30


def test_cutpaste_turns_counter_clockwise():
    bar = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    bar[..., 31:33, :] = 1  # a horizontal line, cut out, turned and pasted in the middle
    noise = torch.full((1, 8), 0.5, dtype=torch.float64)
    out = apply(bar, "cutpaste", {"patch_area": 0.2, "patch_aspect": 3.0, "angle": 45.0}, noise)[0, 0]
    upper_left, upper_right = out[18:26, 18:26], out[18:26, 38:46]
    assert upper_right.sum() > 5 > 0.1 > upper_left.sum()


# Soft masks and gradients


@every_patch
def test_the_soft_mask_converges_to_the_hard_one(kind):
    images = random_images(20)
    noise = draw_noise(20, seeded(14), images)
    hard = apply(images, kind, STATIC[kind], noise)
    differences = [
        (apply(images, kind, STATIC[kind], noise, temperature) - hard).abs().mean().item()
        for temperature in (1.0, 0.1, 0.01, 1e-3, 1e-5)
    ]
    assert differences == sorted(differences, reverse=True)
    assert differences[0] > 1e-3 and differences[-1] < 1e-5


@every_patch
def test_a_soft_patch_has_the_area_of_the_hard_one(kind):
    images = torch.ones(200, 1, 64, 64, dtype=torch.float64)
    noise = draw_noise(200, seeded(15), images)
    soft = apply(images, "cutout", {"patch_area": 0.1, "patch_aspect": 1.5}, noise, 0.5)
    assert 1 - soft.mean().item() == pytest.approx(0.1, rel=0.03)


@every_kind
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_gradients_of_hyperparameters_agree_with_finite_differences(kind, per_image, scale):
    images = random_images(2, 1, 14, 11)
    noise = draw_noise(2, seeded(16), images)
    given = STATIC[kind] | ({"patch_area": 0.1 * scale} if kind in PATCHES else {})
    values = [torch.full((2,) if per_image else (), value, dtype=torch.float64) for value in given.values()]
    temperature = 0.7 * scale if kind in PATCHES else 0.0

    def augmented(*tensors):
        return apply(images, kind, dict(zip(given, tensors, strict=True)), noise, temperature)

    values = [value.requires_grad_() for value in values]
    assert torch.autograd.gradcheck(augmented, values)
    for slope in torch.autograd.grad(augmented(*values).square().sum(), values):
        assert (slope != 0).all()


@every_patch
def test_gradients_are_finite_where_a_pixel_lies_on_a_soft_edge_or_corner(kind):
    images = random_images(1, 1, 16, 16)
    noise = torch.full((1, 8), 0.5, dtype=torch.float64)
    # 5 x 5 pixels about the middle: the corners are centres of pixels.
    given = {"patch_area": (5 / 16) ** 2, "patch_aspect": 1.0} | (
        {"angle": 0.0} if kind == "cutpaste" else {}
    )
    values = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in given.items()
    }
    apply(images, kind, values, noise, 0.5).square().sum().backward()
    assert all(value.grad.isfinite() for value in values.values())


@every_kind
def test_gradients_flow_back_to_the_images(kind):
    images = random_images(2, 1, 10, 10).requires_grad_()
    noise = draw_noise(2, seeded(17), images.detach())
    assert torch.autograd.gradcheck(lambda i: apply(i, kind, STATIC[kind], noise, 0.5), [images])


# What fits


def box(area, aspect, angle, height, width):
    """The bounding box of a patch as fractions of the image."""
    w, h = math.sqrt(area * aspect) * width, math.sqrt(area / aspect) * height
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return max((w * cos + h * sin) / width, (w * sin + h * cos) / height)


def points(value, n):
    return [value.at(i / (n - 1)) for i in range(n)] if isinstance(value, Range) else [value]


def largest_box(hyperparameters, height, width, n=91):
    """Over a dense grid of all that can be drawn."""
    return max(
        box(area, aspect, angle, height, width)
        for area in points(hyperparameters["patch_area"], 3)
        for aspect in points(hyperparameters["patch_aspect"], 9)
        for angle in points(hyperparameters.get("angle", 0.0), n)
    )


@every_kind
@pytest.mark.parametrize("size", [16, 37, 256])
def test_every_combination_of_the_default_ranges_fits_a_square_image(kind, size):
    check_fits(Augmentation(kind), height=size, width=size)
    if kind in PATCHES:
        assert largest_box(DEFAULT_RANGES[kind], size, size) <= 1
        ranges = {"angle": 0.0} | DEFAULT_RANGES[kind]
        for fractions in torch.rand(2000, 3, generator=seeded(18), dtype=torch.float64).tolist():
            drawn_values = {
                name: drawn(ranges[name], u)
                for name, u in zip(("patch_area", "patch_aspect", "angle"), fractions, strict=True)
            }
            assert box(*drawn_values.values(), size, size) <= 1


def fit_cases():
    """Hyperparameters about the edge of what fits, values and ranges, upright and turned."""
    areas = [0.3, 0.45, Range(0.05, 0.6)]
    aspects = [0.5, 1.0, Range(0.7, 2.2, log=True)]
    angles = [
        0.0,
        30.0,
        -45.0,
        90.0,
        Range(-20.0, 10.0),
        Range(-80.0, -60.0),
        Range(100.0, 170.0),
        Range(-180.0, 180.0),
    ]
    return list(itertools.product(areas, aspects, angles, [(32, 32), (24, 40)]))


def test_a_range_is_accepted_where_all_of_its_patches_fit_and_only_there():
    accepted = 0
    for area, aspect, angle, (height, width) in fit_cases():
        given = {"patch_area": area, "patch_aspect": aspect, "angle": angle}
        largest = largest_box(given, height, width, n=721)
        assert abs(largest - 1) > 1e-4  # the grid is fine enough to decide
        try:
            check_fits(Augmentation("cutpaste", given), height=height, width=width)
            accepted += 1
            assert largest < 1, given
        except ValueError:
            assert largest > 1, given
    assert 0 < accepted < len(fit_cases())


@pytest.mark.parametrize("turns", [-2, -1, 0, 1, 2])
def test_a_range_of_angles_is_judged_alike_whole_turns_further(turns):
    given = {"patch_area": 0.6, "patch_aspect": 1.0, "angle": Range(280.0 - 360 * turns, 350.0 - 360 * turns)}
    with pytest.raises(ValueError, match="does not fit"):
        check_fits(Augmentation("cutpaste", given), height=32, width=32)


@pytest.mark.parametrize("kind", ["cutout", "cutavg"])
@pytest.mark.parametrize("value", [0.9, Range(0.1, 0.9)], ids=str)
def test_a_patch_that_does_not_fit_is_an_error_that_names_it_and_the_remedy(kind, value):
    named = rf"^{kind}: .*area 0.9 and aspect 3 does not fit .* smaller patch_area or a patch_aspect nearer"
    augmentation = Augmentation(kind, {"patch_area": value, "patch_aspect": 3.0})
    with pytest.raises(ValueError, match=named):
        check_fits(augmentation, height=32, width=32)
    with pytest.raises(ValueError, match=named):
        augment(random_images(), augmentation, seeded(0))


def test_a_turned_patch_that_does_not_fit_is_an_error_that_names_the_angle():
    check_fits(
        Augmentation("cutpaste", {"patch_area": 0.6, "patch_aspect": 1.0, "angle": 0.0}), height=32, width=32
    )
    turned = Augmentation("cutpaste", {"patch_area": 0.6, "patch_aspect": 1.0, "angle": Range(10.0, 80.0)})
    with pytest.raises(ValueError, match=r"area 0.6 and aspect 1 at 45 degrees does not fit"):
        check_fits(turned, height=32, width=32)


def test_a_patch_as_large_as_the_image_fits_and_covers_all_of_it():
    out = augment(
        random_images(), Augmentation("cutout", {"patch_area": 1.0, "patch_aspect": 1.0}), seeded(0)
    )
    assert (out == 0).all()


@pytest.mark.parametrize("size", [31, 47, 64])  # at some of them the diagonal exceeds the image by rounding
def test_a_turned_patch_whose_diagonal_is_the_image_fits(size):
    turned = Augmentation("cutpaste", {"patch_area": 0.5, "patch_aspect": 1.0, "angle": 45.0})
    check_fits(turned, height=size, width=size)
    with pytest.raises(ValueError, match="at 45 degrees does not fit"):
        check_fits(
            Augmentation("cutpaste", {**turned.hyperparameters, "patch_area": 0.5001}),
            height=size,
            width=size,
        )


def test_a_spot_may_be_larger_than_the_image():
    check_fits(Augmentation("cutdiff", {"patch_area": 100.0, "patch_aspect": 3.0}), height=32, width=32)


# Jitter


def factors(n, strength, seed, dtype):
    """Brightness, contrast, saturation (about 1) and turn of the hue of every image."""
    uniform = torch.rand(n, 4, generator=seeded(seed)).to(dtype)
    return (strength * (2 * uniform - 1) + torch.tensor([1, 1, 1, 0])).tolist()


@pytest.mark.parametrize("strength", [0.1, 0.5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11)])
def test_jitter_is_torchvisions_brightness_contrast_saturation_and_hue_for_each_image(
    strength, height, width
):
    images = torch.rand(30, 3, height, width, generator=seeded(19))
    out = jitter(images, strength, seeded(20))
    settings = factors(30, strength, 20, images.dtype)
    for image, jittered, (brightness, contrast, saturation, hue) in zip(images, out, settings, strict=True):
        expected = reference.adjust_brightness(image, brightness)
        expected = reference.adjust_contrast(expected, contrast)
        expected = reference.adjust_saturation(expected, saturation)
        expected = reference.adjust_hue(expected, hue)
        torch.testing.assert_close(jittered, expected, atol=5e-4, rtol=0)  # their luma weights are rounded


def test_jitter_of_grey_images_is_brightness_and_contrast_alone():
    images = torch.rand(30, 1, 8, 8, generator=seeded(21))
    out = jitter(images, 0.5, seeded(22))
    for image, jittered, (brightness, contrast, _, _) in zip(
        images, out, factors(30, 0.5, 22, images.dtype), strict=True
    ):
        expected = reference.adjust_contrast(reference.adjust_brightness(image, brightness), contrast)
        torch.testing.assert_close(jittered, expected, atol=1e-5, rtol=0)
    in_colour = jitter(images.expand(-1, 3, -1, -1), 0.5, seeded(22))
    torch.testing.assert_close(in_colour, out.expand(-1, 3, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@every_type
@every_device
def test_jitter_keeps_shape_range_type_and_device_and_draws_from_its_seed(channels, dtype, device):
    images = torch.rand(200, channels, 7, 9, generator=seeded(23)).to(device, dtype)
    original, global_state = images.clone(), torch.get_rng_state()
    out = jitter(images, 0.5, seeded(24))
    assert out.shape == images.shape and out.dtype == dtype and out.device == images.device
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    assert torch.equal(out, jitter(images, 0.5, seeded(24)))
    assert not torch.equal(out, jitter(images, 0.5, seeded(25)))
    assert torch.equal(images, original)
    assert torch.equal(torch.get_rng_state(), global_state)
    equal = images[:1].expand_as(images)
    assert len(jitter(equal, 0.5, seeded(24)).flatten(1).unique(dim=0)) > 190  # every image has its own


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_of_no_strength_changes_nothing(channels):
    images = random_images(channels=channels)
    assert torch.equal(jitter(images, 0.0, seeded(26)), images)


def test_a_hyperparameter_without_a_known_coordinate_is_refused():
    with pytest.raises(ValueError, match="coordinate: expected one of log, linear, degrees, got 'square'"):
        Hyperparameter(0.1, 0.5, "square")
    with pytest.raises(ValueError, match="a log range needs low > 0"):
        Hyperparameter(0.0, 0.5, "log")
    with pytest.raises(
        ValueError, match="cutavg: expected hyperparameters patch_area, patch_aspect, got 'x'"
    ):
        hyperparameter_of("cutavg", "x")


def test_two_hyperparameters_of_a_kind_cannot_be_drawn_by_one_number():
    strong, weak = (Hyperparameter(0.1, 0.5, "linear", column=1) for _ in range(2))
    with pytest.raises(ValueError, match=r"column: expected another one of 0\.\.7 for each, got \[1, 1\]"):
        Kind(torch.lerp, {"strong": strong, "weak": weak})
    with pytest.raises(ValueError, match="must_fit: needs patch_area"):
        Kind(torch.lerp, {"strong": strong}, must_fit=True)
