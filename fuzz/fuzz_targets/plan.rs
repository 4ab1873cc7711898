//! Any sizes, boxes and config to plans: every step fits the one before it, every frame is written once.
#![no_main]

use imagine_opd_fuzz::{Choices, choose_boxes, choose_config};
use libfuzzer_sys::fuzz_target;
use views::errors::MAX_ROW_BYTES;
use views::geometry::Region;
use views::header::Limits;
use views::normalize::Normalizer;
use views::plan::{Config, Row, ViewPlan, plan_row};
use views::rgb::Rows;
use views::source::{Probe, Source};
use views::steps::{Layout, Step, Work};
use views::tile::MAX_PICTURE_PIXELS;

const LIMITS: Limits = Limits { max_pixels: u64::MAX, max_bytes: u64::MAX };
/// Of all pictures on the way to a view's samples: views with fewer are made.
const MOST_PIXELS: u64 = 1 << 17;

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let config = choose_config(&mut choices, LIMITS);
    let count = 1 + choices.byte() % 3;
    let sizes: Vec<(u32, u32)> = (0..count).map(|_| choose_size(&mut choices)).collect();
    let most = choices.pick(&[3, 8, 40, 255, 0]);
    let boxes = choose_boxes(&mut choices, sizes[0], sizes.len(), most);
    let probes: Vec<_> = sizes.iter().map(|&size| Ok(Probe { size, header: None })).collect();
    let images: Vec<usize> = (0..sizes.len()).collect();
    let row = Row { images: sizes.iter().map(|_| Source::Bytes(&[])).collect(), boxes };
    let Ok(plan) = plan_row(&row, &images, &probes, &config) else { return };
    let layout = config.layout();
    let frames = plan.count_frames(0..plan.views.len());
    assert!(frames * layout.features() * config.sample_bytes <= MAX_ROW_BYTES);
    assert!(plan.student.end <= plan.views.len() && plan.teacher.end <= plan.views.len());
    assert_eq!(plan.crop_of_box.len(), row.boxes.len());
    assert!(plan.crop_of_box.iter().all(|&crop| crop < plan.crops.len()));
    for &(region, image) in &plan.crops {
        assert_inside(region, sizes[image]);
    }
    for view in &plan.views {
        assert_inside(view.region, sizes[view.image]);
        let mut written = vec![false; view.frames.min(1 << 20)];
        let size = (view.region.width, view.region.height);
        let pixels = walk(&view.steps, size, layout, &mut written, u64::from(size.0) * u64::from(size.1));
        assert!(view.frames > written.len() || written.iter().all(|&done| done), "{view:?}");
        if pixels <= MOST_PIXELS && view.frames * layout.features() <= 1 << 18 {
            make(view, &config);
        }
    }
});

/// Sides of every order of magnitude, and not 0: no image is read with that.
fn choose_size(choices: &mut Choices<'_>) -> (u32, u32) {
    let mut side = || {
        let bits = choices.byte() % 32;
        (choices.word() >> bits).max(1)
    };
    (side(), side())
}

fn assert_inside(region: Region, (width, height): (u32, u32)) {
    assert!(region.width > 0 && region.height > 0, "{region:?}");
    assert!(u64::from(region.left) + u64::from(region.width) <= width.into(), "{region:?} of {width}x{height}");
    assert!(u64::from(region.top) + u64::from(region.height) <= height.into(), "{region:?} of {width}x{height}");
}

/// Checks the steps of a picture of `size`, and marks what they write; gives the pixels of all pictures.
fn walk(steps: &[Step], size: (u32, u32), layout: Layout, written: &mut [bool], pixels: u64) -> u64 {
    let mut sum = pixels;
    for step in steps {
        let mut go_on = |to: (u32, u32), next: &[Step]| {
            assert!(to.0 > 0 && to.1 > 0, "{step:?}");
            let pixels = u64::from(to.0) * u64::from(to.1);
            sum = sum.saturating_add(walk(next, to, layout, written, pixels));
        };
        match step {
            Step::Resize { to, next, .. } => go_on(*to, next),
            Step::Pad { left, top, to, next, .. } => {
                let place = Region { left: *left, top: *top, width: size.0, height: size.1 };
                assert_inside(place, *to);
                assert!(u64::from(to.0) * u64::from(to.1) <= MAX_PICTURE_PIXELS);
                go_on(*to, next);
            }
            Step::Crop { region, next } => {
                assert_inside(*region, size);
                go_on((region.width, region.height), next);
            }
            Step::Outline { regions, next, .. } => {
                regions.iter().for_each(|&region| assert_inside(region, size));
                go_on(size, next);
            }
            Step::Write { first } => {
                let side = match layout {
                    Layout::Patches(patches) => patches.side,
                    Layout::Frames(side) => side,
                };
                let (columns, rows) = (size.0 as usize / side, size.1 as usize / side);
                assert_eq!((columns * side, rows * side), (size.0 as usize, size.1 as usize), "not whole frames");
                for frame in *first..(first + columns * rows).min(written.len()) {
                    assert!(!std::mem::replace(&mut written[frame], true), "frame {frame} is written twice");
                }
            }
        }
    }
    sum
}

/// Makes the samples of a view of a grey picture: all of them must be written, and with one value a channel.
fn make(view: &ViewPlan, config: &Config) {
    let normalizer = Normalizer::<f32>::new(config.scaling, config.parity);
    let mut samples = vec![std::mem::MaybeUninit::new(f32::NAN); view.frames * config.layout().features()];
    let size = (view.region.width, view.region.height);
    let mut work = Work::new(&view.steps, size, config.layout(), config.parity, &normalizer).expect("memory");
    let (width, line) = (size.0 as usize, size.0 as usize * 3);
    let pixels = vec![128; line * 7];
    for top in (0..size.1 as usize).step_by(7) {
        let rows = Rows::new(&pixels, width, line, (size.1 as usize - top).min(7));
        work.push(rows, &mut samples).expect("memory");
    }
    #[expect(unsafe_code, reason = "samples are read that may not have been written")]
    // SAFETY: they were all made NaN before.
    let found = samples.iter().map(|sample| unsafe { sample.assume_init() });
    assert!(found.into_iter().all(f32::is_finite), "{view:?}");
}
