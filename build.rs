//! Builds the C side of the JPEG reader against the headers of the libjpeg-turbo that `turbojpeg-sys` built.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=rust/jpeg_shim.c");
    let include = env::var("DEP_TURBOJPEG_INCLUDE")
        .expect("turbojpeg-sys tells no include folder; unset TURBOJPEG_SOURCE or set TURBOJPEG_INCLUDE_DIR");
    cc::Build::new().file("rust/jpeg_shim.c").includes(include.split(',')).compile("imagine_jpeg");
    if env::var_os("CARGO_FEATURE_SIMD").is_none() {
        println!(
            "cargo::warning=libjpeg-turbo is not made to use SIMD (Cargo feature `simd` is off): JPEG decoding may be \
             several times slower, the pixels are the same"
        );
    }
}
