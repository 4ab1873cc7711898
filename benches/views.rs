//! What each stage of a view costs on one thread, from a JPEG drawn here to the rows, samples and views made of it.
//!
//! `cargo bench --no-default-features --features simd`; ratios to transformers are `bench_views.py`'s business.

use std::hint::black_box;
use std::mem::MaybeUninit;

use _rust::batch::{make_views, plan_rows};
use _rust::decode::{Policy, Wanted, decode, decode_rows, scaled_size};
use _rust::fill::{Control, Shared};
use _rust::formats::read_header;
use _rust::geometry::{CropRule, PixelBox, Region};
use _rust::header::{Header, Limits};
use _rust::looks::Degrade;
use _rust::normalize::{Normalizer, Sample, Scaling};
use _rust::patchify::{Budget, PatchWriter, Patches};
use _rust::plan::{Config, CropConfig, Row, Scheme};
use _rust::resize::Resize;
use _rust::rgb::BYTES;
use _rust::source::{Source, array_rows};
use _rust::weights::{Filter, Parity};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rayon::ThreadPoolBuilder;

/// Twelve megapixels, and what Qwen3-VL makes of it within a megapixel.
const SIZE: (u32, u32) = (4032, 3024);
const RESIZED: (u32, u32) = (1152, 864);
const PATCHES: Patches = Patches { side: 16, merge: 2, temporal: 2 };
const SCALING: Scaling = Scaling { mean: [0.5; 3], std: [0.5; 3], rescale_factor: 1.0 / 255.0 };
const LIMITS: Limits = Limits { max_pixels: 1 << 28, max_bytes: 1 << 28 };
/// Rows that are handed on at a time, as a batch does it.
const STRIP: usize = 16;

/// Soft shapes under grain: an entropy near a photograph's.
fn draw((width, height): (u32, u32)) -> Vec<u8> {
    let mut state = 1_u32;
    let mut pixels = Vec::with_capacity(width as usize * height as usize * BYTES);
    for y in 0..height {
        for x in 0..width {
            // Marsaglia's xorshift; the sum of four bytes is nearly normal.
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            let grain = state.to_le_bytes().map(i32::from).iter().sum::<i32>() - 510;
            let shape = (x as f32 * 0.011).sin() * (y as f32 * 0.017).cos();
            let shades = [120.0 + 90.0 * shape, 110.0 + 60.0 * shape, 130.0 - 50.0 * shape];
            pixels.extend(shades.map(|shade| (shade as i32 + grain / 46).clamp(0, 255) as u8));
        }
    }
    pixels
}

/// At quality 90, 4:2:0.
#[expect(unsafe_code, reason = "the library's encoder is called directly: the crate itself only decodes")]
fn encode(pixels: &[u8], (width, height): (u32, u32)) -> Vec<u8> {
    use turbojpeg_sys as tj;
    assert_eq!(pixels.len(), width as usize * height as usize * BYTES);
    let (mut bytes, mut len) = (std::ptr::null_mut(), 0);
    // SAFETY: the handle is asserted to be one, `pixels` is as long as the sides say, and a null buffer makes the
    // encoder allocate one of `len` bytes, which are copied before it is freed.
    unsafe {
        let handle = tj::tj3Init(tj::TJINIT_TJINIT_COMPRESS as i32);
        assert!(!handle.is_null());
        tj::tj3Set(handle, tj::TJPARAM_TJPARAM_QUALITY as i32, 90);
        tj::tj3Set(handle, tj::TJPARAM_TJPARAM_SUBSAMP as i32, tj::TJSAMP_TJSAMP_420);
        let format = tj::TJPF_TJPF_RGB;
        let fault = tj::tj3Compress8(
            handle,
            pixels.as_ptr(),
            width as i32,
            0,
            height as i32,
            format,
            &raw mut bytes,
            &raw mut len,
        );
        assert_eq!(fault, 0);
        let copy = std::slice::from_raw_parts(bytes, len as usize).to_vec();
        tj::tj3Free(bytes.cast());
        tj::tj3Destroy(handle);
        copy
    }
}

fn config() -> Config {
    let budget = Budget { min_pixels: 65_536, max_pixels: 1_048_576 };
    Config {
        scheme: Scheme::Patches { patches: PATCHES, budget, crop_budget: budget },
        filter: Filter::Bicubic,
        parity: Parity::Torchvision,
        scaling: SCALING,
        policy: Policy::default(),
        crops: CropConfig {
            rule: CropRule { margin: 0.0, min_side: 1 },
            merge_overlap: None,
            reading_order: false,
        },
        degrade: Degrade { scale: 1.0, blur_px: 0.0 },
        highlight: None,
        neutral: None,
        teacher_global: true,
        student: true,
        scaled_decode: false,
        sample_bytes: 4,
        limits: LIMITS,
        cache_bytes: 0,
    }
}

fn bench_decoding(criterion: &mut Criterion, jpeg: &[u8], header: &Header) {
    let mut group = criterion.benchmark_group("decode");
    group.sample_size(20).throughput(Throughput::Bytes(jpeg.len() as u64));
    group.bench_function("header", |bencher| {
        bencher.iter(|| read_header(std::io::Cursor::new(black_box(jpeg)), LIMITS).map(|header| header.size()));
    });
    let lower = Region { left: 2000, top: 1500, width: 900, height: 700 };
    for (name, region, denominator) in [("whole", None, 1), ("half size", None, 2), ("region", Some(lower), 1)] {
        let (width, height) = scaled_size(header, denominator);
        let wanted = Wanted { region: region.unwrap_or(Region::whole(width, height)), denominator };
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut seen = 0;
                let done = decode_rows(jpeg, header, Policy::default(), wanted, &mut |rows| {
                    seen += rows.count();
                    Ok(())
                });
                assert!(done.is_ok() && seen == wanted.region.height as usize);
            });
        });
    }
}

fn bench_resizing(criterion: &mut Criterion, pixels: &[u8]) {
    let mut group = criterion.benchmark_group("resize");
    group.sample_size(20).throughput(Throughput::Bytes(pixels.len() as u64));
    let filters = [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic), ("lanczos", Filter::Lanczos)];
    let parities = [("torchvision", Parity::Torchvision), ("Pillow", Parity::Pillow)];
    for (filter_name, filter) in filters {
        for (parity_name, parity) in parities {
            group.bench_function(format!("{filter_name}, {parity_name}"), |bencher| {
                bencher.iter(|| {
                    let mut resize = Resize::new(SIZE, RESIZED, filter, parity).expect("memory");
                    let mut made = 0;
                    for strip in array_rows(pixels, SIZE.0, SIZE.1).strips(STRIP) {
                        let mut emit = |rows: _rust::rgb::Rows<'_>| {
                            made += rows.count();
                            Ok(())
                        };
                        resize.push(strip, &mut emit).expect("memory");
                    }
                    assert_eq!(made, RESIZED.1 as usize);
                });
            });
        }
    }
}

fn bench_writing<T: Sample>(criterion: &mut Criterion, name: &str) {
    let pixels = draw(RESIZED);
    let normalizer = Normalizer::<T>::new(SCALING, Parity::Torchvision);
    let mut out = vec![MaybeUninit::<T>::uninit(); pixels.len() * PATCHES.temporal];
    let mut group = criterion.benchmark_group("write patches");
    group.sample_size(20).throughput(Throughput::Bytes(size_of_val(out.as_slice()) as u64));
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            let mut writer = PatchWriter::new(PATCHES, RESIZED.0).expect("memory");
            for strip in array_rows(&pixels, RESIZED.0, RESIZED.1).strips(STRIP) {
                writer.push(strip, &normalizer, &mut out);
            }
            black_box(&out);
        });
    });
}

fn bench_views(criterion: &mut Criterion, jpeg: &[u8], pixels: &[u8]) {
    let pool = ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let (shared, config) = (Shared::default(), config());
    let boxes =
        [(403.0, 453.0, 1053.0, 923.0), (2217.0, 1512.0, 2658.0, 1857.0), (2419.0, 1360.0, 3464.0, 2132.0)];
    let boxes = boxes.map(|(x0, y0, x1, y1)| PixelBox { x0, y0, x1, y1, image: 0 }).to_vec();
    let decoded = Source::Pixels { pixels, width: SIZE.0, height: SIZE.1 };
    let rows = [
        ("JPEG, global", Row { images: vec![Source::Bytes(jpeg)], boxes: Vec::new() }),
        ("JPEG, global and 3 crops", Row { images: vec![Source::Bytes(jpeg)], boxes: boxes.clone() }),
        ("decoded, global", Row { images: vec![decoded.clone()], boxes: Vec::new() }),
        ("decoded, global and 3 crops", Row { images: vec![decoded], boxes }),
    ];
    let mut group = criterion.benchmark_group("views");
    group.sample_size(20);
    for (name, row) in rows {
        let rows = [row];
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let made = make_views::<f32>(
                    plan_rows(&rows, &config, &pool),
                    &config,
                    &pool,
                    &shared,
                    &Control::default(),
                );
                assert!(made.rows.iter().all(Result::is_ok));
                made
            });
        });
    }
}

fn bench_all(criterion: &mut Criterion) {
    let drawn = draw(SIZE);
    let jpeg = encode(&drawn, SIZE);
    let header = read_header(std::io::Cursor::new(&jpeg[..]), LIMITS).expect("a JPEG");
    let pixels = decode(&jpeg, &header, Policy::default()).expect("a JPEG").pixels;
    bench_decoding(criterion, &jpeg, &header);
    bench_resizing(criterion, &pixels);
    bench_writing::<f32>(criterion, "float32");
    bench_writing::<u16>(criterion, "bfloat16");
    bench_writing::<u8>(criterion, "uint8");
    bench_views(criterion, &jpeg, &pixels);
}

criterion_group!(views, bench_all);
criterion_main!(views);
