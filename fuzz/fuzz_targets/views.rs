//! Any bytes, boxes and config to views: an error value or every sample written, the same whatever the way there.
#![no_main]

use std::sync::LazyLock;

use imagine_opd_fuzz::{Choices, choose_boxes, choose_config};
use libfuzzer_sys::fuzz_target;
use rayon::{ThreadPool, ThreadPoolBuilder};
use views::batch::{Batch, make_views, plan_rows};
use views::decode::decode;
use views::fill::{Control, Shared};
use views::formats::read_header;
use views::header::Limits;
use views::plan::{Config, Row};
use views::source::Source;

const LIMITS: Limits = Limits { max_pixels: 1 << 16, max_bytes: 1 << 20 };
/// Of samples, so that an input takes milliseconds.
const MOST_SAMPLES: usize = 1 << 21;

static POOLS: LazyLock<[ThreadPool; 2]> = LazyLock::new(|| {
    [1, 2].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start"))
});

fuzz_target!(|input: &[u8]| {
    let mut choices = Choices::new(input);
    let mut config = choose_config(&mut choices, LIMITS);
    let way = choices.byte() % 3;
    let size = read_header(std::io::Cursor::new(input), LIMITS).map_or((1, 1), |header| header.size());
    let boxes = choose_boxes(&mut choices, size, 1, 3);
    let row = Row { images: vec![Source::Bytes(input)], boxes: boxes.clone() };
    let plan = plan_rows(&[row.clone()], &config, &POOLS[0]).plans.remove(0);
    let Ok(plan) = plan else {
        assert!(make(&[row], &config, 0, &Shared::default()).rows[0].is_err(), "planned otherwise");
        return;
    };
    if plan.count_frames(0..plan.views.len()) * config.layout().features() > MOST_SAMPLES {
        return;
    }
    let shared = Shared::default();
    let found = make(&[row.clone()], &config, 0, &shared);
    let again = match way {
        // Decoded whole, and its views spread over threads. `scaled_decode` is not for these.
        0 if !config.scaled_decode => make(&[row], &config, 1, &shared),
        // Kept, then looked up.
        1 => {
            config.cache_bytes = 1 << 26;
            make(&[row.clone()], &config, 0, &shared);
            make(&[row], &config, 0, &shared)
        }
        // As pixels in memory.
        2 if !config.scaled_decode => {
            let Ok(header) = read_header(std::io::Cursor::new(input), LIMITS) else { return };
            let Ok(image) = decode(input, &header, config.policy) else { return };
            let source = Source::Pixels { pixels: &image.pixels, width: image.width, height: image.height };
            make(&[Row { images: vec![source], boxes }], &config, 0, &shared)
        }
        _ => return,
    };
    // A damaged file may have a region before the damage, and no whole.
    if found.rows[0].is_ok() && again.rows[0].is_ok() {
        assert!(bits(&found) == bits(&again), "way {way}: {config:?}");
    }
});

/// The views, every sample of which must be written: what was not is a NaN here.
fn make(rows: &[Row<'_>], config: &Config, pool: usize, shared: &Shared) -> Batch<f32> {
    let made = make_views::<f32>(
        plan_rows(rows, config, &POOLS[pool]),
        config,
        &POOLS[pool],
        shared,
        &Control::default(),
    );
    assert!(made.samples.iter().all(|sample| sample.is_finite()), "{config:?}");
    if made.rows[0].is_err() {
        assert!(made.samples.iter().all(|&sample| sample == 0.0));
    }
    made
}

fn bits(batch: &Batch<f32>) -> Vec<u32> {
    batch.samples[batch.lead..].iter().map(|sample| sample.to_bits()).collect()
}
