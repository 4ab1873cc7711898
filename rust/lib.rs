//! The list of modules: image views from encoded bytes to samples, in the order the data takes.

pub mod errors;
pub mod geometry;
pub mod rgb;

pub mod header;
pub mod orient;
pub mod samples;

pub mod gif;
pub mod jpeg;
pub mod png;
pub mod webp;

pub mod decode;
pub mod formats;

pub mod weights;

pub mod convolve;
#[cfg(target_arch = "x86_64")]
mod convolve_avx2;
#[cfg(target_arch = "x86_64")]
mod convolve_avx512;
mod passes;
pub mod resize;
mod ring;

pub mod frames;
pub mod normalize;
pub mod patchify;

pub mod steps;

pub mod grids;

pub mod looks;
pub mod tile;

pub mod source;

pub mod plan;

pub mod cache;
pub mod memory;

pub mod fill;

pub mod batch;

#[cfg(test)]
mod properties;

#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python")]
mod python_fields;
