//! Builds what counts the coverage of the C libraries.

fn main() {
    println!("cargo::rerun-if-changed=counters.c");
    println!("cargo::rustc-link-arg-bins=-Wl,--wrap=__sanitizer_cov_trace_pc");
    cc::Build::new().file("counters.c").link_lib_modifier("+whole-archive").compile("imagine_counters");
}
