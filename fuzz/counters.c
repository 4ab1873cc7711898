/* Coverage of the C libraries for libFuzzer: the calls that `-fsanitize-coverage=trace-pc` puts into them in, counters
 * out.
 *
 * GCC knows no other kind of coverage, and libFuzzer's own function of this name only warns: the linker wraps it.
 */

#include <stdint.h>

/* Not itself counted or checked: it would call itself without end. */
#ifdef __clang__
#define PLAIN __attribute__((no_sanitize("address", "coverage")))
#else
#define PLAIN __attribute__((no_sanitize_address, no_sanitize_coverage))
#endif

enum { COUNTERS = 1 << 16 };

__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t counters[COUNTERS];

PLAIN void __wrap___sanitizer_cov_trace_pc(void)
{
  uintptr_t place = (uintptr_t)__builtin_return_address(0);
  counters[(place ^ place >> 16) % COUNTERS]++;
}

/* GCC's `trace-cmp` also tells of floats, of which libFuzzer does not want to know. */
PLAIN void __sanitizer_cov_trace_cmpf(float a, float b)
{
  (void)a, (void)b;
}

PLAIN void __sanitizer_cov_trace_cmpd(double a, double b)
{
  (void)a, (void)b;
}
