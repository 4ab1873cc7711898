//! Cuts of each family as its processor makes them, and hostile parameters.

use super::*;

/// As in the checkpoints: `InternVL3`, `LLaVA-NeXT`, `LLaVA-OneVision`, Idefics3, Gemma 3.
fn tiling(family: Family) -> Tiling {
    let (frame, filter, fill) = match family {
        Family::Internvl => (448, Filter::Bicubic, [0; 3]),
        Family::LlavaNext => (336, Filter::Bicubic, [0; 3]),
        Family::LlavaOnevision => (384, Filter::Bicubic, fill_of([0.5, 0.456, 0.4])),
        Family::Idefics3 => (364, Filter::Lanczos, [0; 3]),
        Family::Gemma3 => (896, Filter::Bilinear, [0; 3]),
    };
    let pinpoints = if family == Family::LlavaNext {
        vec![(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    } else {
        (1..=6).flat_map(|rows| (1..=6).map(move |columns| (rows * 384, columns * 384))).collect()
    };
    Tiling {
        family,
        frame,
        filter,
        split: true,
        min_tiles: 1,
        max_tiles: 12,
        pinpoints,
        longest_edge_px: 1456,
        min_crop_px: 256,
        max_crops: 4,
        min_ratio: 1.2,
        fill,
    }
}

fn with(family: Family, change: impl FnOnce(&mut Tiling)) -> Tiling {
    let mut tiling = tiling(family);
    change(&mut tiling);
    tiling
}

/// The tree in one line: `R` resize, `P` pad at, `C` crop at, `W` write from.
fn show(steps: &[Step]) -> String {
    let shown = steps.iter().map(|step| match step {
        Step::Resize { to, next, .. } => format!("R{}x{}[{}]", to.0, to.1, show(next)),
        Step::Pad { left, top, to, fill, next } => {
            format!("P{left},{top}:{}x{}{fill:?}[{}]", to.0, to.1, show(next))
        }
        Step::Crop { region: Region { left, top, width, height }, next } => {
            format!("C{left},{top}:{width}x{height}[{}]", show(next))
        }
        Step::Write { first } => format!("W{first}"),
        other @ Step::Outline { .. } => format!("{other:?}"),
    });
    shown.collect::<Vec<_>>().join(" ")
}

fn assert_cuts(tiling: &Tiling, alone: bool, table: &[(Size, usize, (usize, usize), &str)]) {
    for &((width, height), frames, grid, steps) in table {
        let cut = tiling.cut(width, height, alone).unwrap();
        let found = (cut.frames, cut.grid, show(&cut.steps));
        assert_eq!(found, (frames, grid, steps.to_owned()), "{:?} {width}x{height}", tiling.family);
    }
}

// The expected values of the tables are those that transformers 5.24 gave for these sizes.

#[test]
fn internvl_cuts_as_its_processor() {
    let plain = tiling(Family::Internvl);
    assert_cuts(
        &plain,
        true,
        &[
            ((1, 1), 1, (0, 0), "R448x448[W0]"),
            ((448, 448), 1, (0, 0), "W0"),
            ((1, 900), 13, (12, 1), "R448x5376[W0] R448x448[W12]"),
            ((896, 448), 3, (1, 2), "W0 R448x448[W2]"),
            // As near to 1x1 as to 2x2, with half the pixels of 2x2 or just over.
            ((633, 634), 1, (0, 0), "R448x448[W0]"),
            ((634, 634), 5, (2, 2), "R896x896[W0] R448x448[W4]"),
            // 2.5 is between 2 and 3 and met by 5x2 itself.
            ((1120, 448), 11, (2, 5), "R2240x896[W0] R448x448[W10]"),
            ((300, 200), 7, (2, 3), "R1344x896[W0] R448x448[W6]"),
            ((5, 6), 13, (4, 3), "R1344x1792[W0] R448x448[W12]"),
        ],
    );
    let several = Tiling { min_tiles: 2, max_tiles: 6, ..plain.clone() };
    assert_cuts(&several, true, &[((448, 448), 5, (2, 2), "R896x896[W0] W4")]);
    // As near to both, and 2x2 is exactly twice the image: not more than that.
    let small = Tiling { frame: 12, max_tiles: 4, ..plain.clone() };
    assert_cuts(&small, true, &[((16, 18), 1, (0, 0), "R12x12[W0]")]);
    let none = Tiling { min_tiles: 3, max_tiles: 2, ..plain };
    assert_cuts(&none, true, &[((900, 448), 1, (0, 0), "R448x448[W0]")]);
}

#[test]
fn llava_cuts_as_its_processors() {
    assert_cuts(
        &tiling(Family::LlavaNext),
        true,
        &[
            ((1, 1), 3, (1, 2), "R336x336[W0] R336x336[P168,0:672x336[0, 0, 0][W1]]"),
            ((1, 2000), 3, (1, 2), "R336x336[W0] R1x336[P335,0:672x336[0, 0, 0][W1]]"),
            ((672, 336), 3, (1, 2), "R336x336[W0] W1"),
            ((671, 336), 3, (1, 2), "R336x336[W0] P0,0:672x336[0, 0, 0][W1]"),
            ((500, 333), 3, (1, 2), "R336x336[W0] R505x336[P83,0:672x336[0, 0, 0][W1]]"),
            ((667, 1000), 5, (2, 2), "R336x336[W0] R449x672[P111,0:672x672[0, 0, 0][W1]]"),
            ((3, 1009), 4, (3, 1), "R336x336[W0] R3x1008[P166,0:336x1008[0, 0, 0][W1]]"),
        ],
    );
    // Both keep every pixel; the second wastes less.
    let falling = with(Family::LlavaNext, |tiling| tiling.pinpoints = vec![(672, 672), (336, 672)]);
    assert_cuts(&falling, true, &[((100, 50), 3, (1, 2), "R336x336[W0] R672x336[W1]")]);
    let onevision = tiling(Family::LlavaOnevision);
    assert_cuts(
        &onevision,
        true,
        &[
            ((384, 384), 2, (1, 1), "W0 W1"),
            ((1920, 1080), 16, (3, 5), "R384x384[W0] P0,36:1920x1152[0, 0, 0][W1]"),
            ((2305, 7), 7, (1, 6), "R384x384[W0] R2304x7[P0,188:2304x384[0, 0, 0][W1]]"),
        ],
    );
    assert_cuts(
        &onevision,
        false,
        &[
            ((384, 384), 1, (0, 0), "W0"),
            ((7, 4), 1, (0, 0), "P0,1:7x7[127, 116, 102][R384x384[W0]]"),
            ((300, 1001), 1, (0, 0), "P350,0:1001x1001[127, 116, 102][R384x384[W0]]"),
        ],
    );
}

#[test]
fn idefics3_cuts_as_its_processor_and_keeps_every_resize() {
    let plain = tiling(Family::Idefics3);
    assert_cuts(
        &plain,
        true,
        &[
            ((1456, 1456), 17, (4, 4), "W0 R364x364[W16]"),
            ((1456, 363), 5, (1, 4), "R1456x364[W0 R364x364[W4]]"),
            ((3, 2), 13, (3, 4), "R1456x970[R1456x1092[W0 R364x364[W12]]]"),
            ((640, 427), 13, (3, 4), "R1456x972[R1456x1092[W0 R364x364[W12]]]"),
            ((1, 5000), 5, (4, 1), "R1x1456[R364x1456[W0 R364x364[W4]]]"),
        ],
    );
    // 5001 is evened to 5002, which makes the height the longer side, and is cut to 4096.
    let large = Tiling { longest_edge_px: 5001, ..plain.clone() };
    assert_cuts(&large, true, &[((9, 9), 145, (12, 12), "R4095x4096[R4368x4368[W0 R364x364[W144]]]")]);
    // 334 grows to 364.7, which is one tile.
    let uneven = Tiling { longest_edge_px: 1000, ..plain.clone() };
    assert_cuts(&uneven, true, &[((1000, 334), 4, (1, 3), "R1092x364[W0 R364x364[W3]]")]);
    let odd = Tiling { frame: 101, longest_edge_px: 101, ..plain.clone() };
    assert_cuts(
        &odd,
        true,
        &[
            ((64, 64), 5, (2, 2), "R101x102[R202x202[W0 R101x101[W4]]]"),
            ((64, 63), 1, (0, 0), "R101x100[R101x101[W0]]"),
        ],
    );
    let one = Tiling { split: false, ..plain };
    assert_cuts(&one, true, &[((640, 427), 1, (0, 0), "R1456x972[R364x364[W0]]")]);
}

#[test]
fn idefics3_gives_a_line_of_pixels_one_tile() {
    // The reference fails here: 1 / 2940 times 2940 falls short of 1.
    let tiling = Tiling { frame: 980, longest_edge_px: 2940, ..tiling(Family::Idefics3) };
    assert_cuts(&tiling, true, &[((1, 5204), 4, (3, 1), "R1x2940[R980x2940[W0 R980x980[W3]]]")]);
}

#[test]
fn gemma3_cuts_as_its_processor() {
    assert_cuts(
        &tiling(Family::Gemma3),
        true,
        &[
            ((1199, 1000), 1, (0, 0), "R896x896[W0]"),
            ((1000, 1200), 3, (2, 1), "R896x896[W0] C0,0:1000x600[R896x896[W1]] C0,600:1000x600[R896x896[W2]]"),
            // 2.5 rounds up to three crops.
            (
                (2500, 1000),
                4,
                (1, 3),
                "R896x896[W0] C0,0:834x1000[R896x896[W1]] C834,0:834x1000[R896x896[W2]] C1668,0:832x1000[R896x896[W3]]",
            ),
            ((511, 300), 3, (1, 2), "R896x896[W0] C0,0:256x300[R896x896[W1]] C256,0:255x300[R896x896[W2]]"),
            ((3000, 255), 1, (0, 0), "R896x896[W0]"),
            ((896, 896), 1, (0, 0), "W0"),
        ],
    );
}

#[test]
fn unsplit_is_one_frame() {
    for family in [Family::Internvl, Family::LlavaNext, Family::Gemma3] {
        let tiling = with(family, |tiling| tiling.split = false);
        assert_cuts(&tiling, true, &[((900, 300), 1, (0, 0), &format!("R{0}x{0}[W0]", tiling.frame))]);
    }
}

#[test]
fn hostile_parameters_are_faults() {
    use Family::{Gemma3, Idefics3, Internvl, LlavaNext, LlavaOnevision};
    use TileFault::{EmptyCrop, NoPinpoint, TooLarge, TooLong, TooManyTiles, Zero};
    const MOST: u32 = u32::MAX;
    let zero = |name| Zero { name };
    let tiles = |tiles| TooManyTiles { tiles };
    let square = |side| TooLarge { width: side, height: side };
    let no_pinpoint = NoPinpoint { frame: 336 };
    let whole = u64::from(MOST);
    let gemma3_of_one = |tiling: &mut Tiling| (tiling.min_crop_px, tiling.max_crops) = (1, MOST);
    let table = [
        (with(Internvl, |_| ()), (0, 5), zero("width")),
        (with(Internvl, |_| ()), (5, 0), zero("height")),
        (with(Internvl, |it| it.frame = 0), (5, 5), zero("frame_px")),
        (with(Internvl, |it| it.frame = MOST), (5, 5), square(whole)),
        (with(Internvl, |it| it.max_tiles = MOST), (5, 5), tiles(whole)),
        (with(Internvl, |it| it.frame = 32_768), (2, 1), TooLarge { width: 65_536, height: 32_768 }),
        (with(LlavaNext, |it| it.pinpoints.clear()), (5, 5), no_pinpoint.clone()),
        (with(LlavaNext, |it| it.pinpoints = vec![(0, 336)]), (5, 5), no_pinpoint.clone()),
        (with(LlavaNext, |it| it.pinpoints = vec![(336, 500)]), (5, 5), no_pinpoint),
        (with(LlavaNext, |it| (it.frame, it.pinpoints) = (1, vec![(MOST, MOST)])), (MOST, MOST), square(whole)),
        (with(LlavaOnevision, |_| ()), (1, 1 << 20), square(1 << 20)),
        (with(Idefics3, |it| it.longest_edge_px = 0), (5, 5), zero("longest_edge_px")),
        (with(Idefics3, |it| (it.frame, it.longest_edge_px) = (8, MOST)), (MOST, MOST), tiles(512 * 512)),
        (with(Gemma3, |it| it.min_crop_px = 0), (5, 5), zero("min_crop_px")),
        (with(Gemma3, |it| it.max_crops = 0), (5, 5), zero("max_crops")),
        (with(Gemma3, gemma3_of_one), (MOST, 1), tiles(whole)),
        (with(Internvl, |_| ()), (1, 131_073), TooLong { width: 1, height: 131_073 }),
        (with(Gemma3, |it| it.split = false), (MOST, 9), TooLong { width: MOST, height: 9 }),
        // Four crops of two pixels: the fourth begins behind the fifth pixel.
        (with(Gemma3, |it| it.min_crop_px = 1), (5, 1), EmptyCrop { width: 5, height: 1, crops: 4 }),
    ];
    for (tiling, (width, height), fault) in table {
        assert_eq!(tiling.cut(width, height, false).unwrap_err(), fault, "{tiling:?}");
    }
}

#[test]
fn longest_edge_has_no_limit_of_its_own() {
    let tiling = with(Family::Idefics3, |tiling| tiling.longest_edge_px = 1_000_000_000);
    assert_cuts(&tiling, true, &[((4096, 3), 13, (1, 12), "R4368x364[W0 R364x364[W12]]")]);
}
