/* Rows of a JPEG file in memory by libjpeg-turbo: bytes and a window in, RGB or CMYK rows out, faults as numbers.
 *
 * libjpeg reports an error by a call that must not return. Here it jumps to the function of this file that was called
 * last, which then returns the fault: no jump ever crosses a frame of another language.
 */

#include <limits.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

enum fault { FAULT_NONE, FAULT_CORRUPT, FAULT_TRUNCATED, FAULT_SCANS, FAULT_MEMORY };

enum { MARKER_END = 0xd9, ROWS_AT_ONCE = 32, SMOOTHED_COEFFICIENTS = 10 };

struct imagine_jpeg {
  struct jpeg_decompress_struct jpeg;
  struct jpeg_error_mgr errors;
  struct jpeg_progress_mgr progress;
  jmp_buf caller;
  enum fault fault;
  int max_scans;
  char message[JMSG_LENGTH_MAX];
};

struct imagine_jpeg_info {
  unsigned width, height;
  int inks; /* 1: the rows are CMYK, four bytes a pixel; 0: RGB */
};

struct imagine_jpeg_settings {
  int denominator, max_scans;
  long max_memory;
  unsigned left, top, right; /* what is wanted, in pixels of the scaled picture */
};

struct imagine_jpeg_rows {
  unsigned width, height; /* of the scaled picture */
  unsigned left, top;     /* where the rows that will be read begin: at what is wanted or before it */
  unsigned row_pixels;    /* how long they are */
};

static void take_fault(struct imagine_jpeg *self, enum fault fault)
{
  if (self->fault == FAULT_NONE) {
    self->fault = fault;
    self->errors.format_message((j_common_ptr)&self->jpeg, self->message);
  }
}

static enum fault name_fault(int code)
{
  switch (code) {
  case JWRN_JPEG_EOF: case JWRN_HIT_MARKER: case JERR_INPUT_EOF: case JERR_INPUT_EMPTY:
    return FAULT_TRUNCATED;
  case JERR_OUT_OF_MEMORY: case JERR_NO_BACKING_STORE:
    return FAULT_MEMORY;
  default:
    return FAULT_CORRUPT;
  }
}

static void leave(j_common_ptr jpeg)
{
  struct imagine_jpeg *self = jpeg->client_data;
  take_fault(self, name_fault(self->errors.msg_code));
  longjmp(self->caller, 1);
}

/* Any warning means that libjpeg makes up pixels, and is a fault. Stray bytes before the end marker are the exception,
 * since cameras write them behind the last pixel. */
static void hear_message(j_common_ptr jpeg, int level)
{
  struct jpeg_error_mgr *errors = jpeg->err;
  if (level >= 0)
    return;
  errors->num_warnings++;
  if (errors->msg_code == JWRN_EXTRANEOUS_DATA && errors->msg_parm.i[1] == MARKER_END)
    return;
  leave(jpeg);
}

static void drop_message(j_common_ptr jpeg)
{
  (void)jpeg;
}

static void watch_scans(j_common_ptr jpeg)
{
  struct imagine_jpeg *self = jpeg->client_data;
  if (self->jpeg.input_scan_number > self->max_scans) {
    take_fault(self, FAULT_SCANS);
    longjmp(self->caller, 1);
  }
}

struct imagine_jpeg *imagine_jpeg_new(void)
{
  return calloc(1, sizeof(struct imagine_jpeg));
}

void imagine_jpeg_free(struct imagine_jpeg *self)
{
  jpeg_destroy_decompress(&self->jpeg); /* raises no error, and takes a struct of zeros too */
  free(self);
}

const char *imagine_jpeg_message(const struct imagine_jpeg *self)
{
  return self->message;
}

/* `bytes` must stay in place until `imagine_jpeg_free`. */
int imagine_jpeg_read_header(struct imagine_jpeg *self, const unsigned char *bytes, size_t len,
                             struct imagine_jpeg_info *info)
{
  struct jpeg_decompress_struct *jpeg = &self->jpeg;
  jpeg->err = jpeg_std_error(&self->errors);
  self->errors.error_exit = leave;
  self->errors.emit_message = hear_message;
  self->errors.output_message = drop_message;
  jpeg->client_data = self; /* kept by jpeg_create_decompress, as is `err` */
  if (setjmp(self->caller))
    return self->fault;
  if (len > ULONG_MAX)
    ERREXIT(jpeg, JERR_OUT_OF_MEMORY);
  jpeg_create_decompress(jpeg);
  self->progress.progress_monitor = watch_scans;
  self->max_scans = INT_MAX;
  jpeg->progress = &self->progress;
  jpeg_mem_src(jpeg, bytes, (unsigned long)len);
  jpeg_read_header(jpeg, TRUE);
  info->width = jpeg->image_width;
  info->height = jpeg->image_height;
  info->inks = jpeg->jpeg_color_space == JCS_CMYK || jpeg->jpeg_color_space == JCS_YCCK;
  return FAULT_NONE;
}

/* Whether libjpeg guesses coefficients from their neighbours, in a progressive file that leaves some out: its guesses
 * depend on where the rows and columns begin. */
static int is_smoothed(const struct jpeg_decompress_struct *jpeg)
{
  if (jpeg->coef_bits == NULL)
    return 0;
  for (int component = 0; component < jpeg->num_components; component++)
    for (int k = 0; k < SMOOTHED_COEFFICIENTS; k++)
      if (jpeg->coef_bits[component][k] != 0)
        return 1;
  return 0;
}

/* Goes on to what is wanted, leaving out the columns and rows around it as far as the pixels stay the same. */
int imagine_jpeg_start(struct imagine_jpeg *self, const struct imagine_jpeg_settings *settings,
                       struct imagine_jpeg_rows *rows)
{
  struct jpeg_decompress_struct *jpeg = &self->jpeg;
  if (setjmp(self->caller))
    return self->fault;
  self->max_scans = settings->max_scans;
  jpeg->mem->max_memory_to_use = settings->max_memory;
  jpeg->scale_num = 1;
  jpeg->scale_denom = (unsigned)settings->denominator;
  jpeg->dct_method = JDCT_ISLOW;
  jpeg->do_fancy_upsampling = TRUE;
  /* libjpeg does not turn four inks into RGB. */
  int inks = jpeg->jpeg_color_space == JCS_CMYK || jpeg->jpeg_color_space == JCS_YCCK;
  jpeg->out_color_space = inks ? JCS_CMYK : JCS_RGB;
  jpeg_start_decompress(jpeg);

  rows->width = jpeg->output_width;
  rows->height = jpeg->output_height;
  rows->left = 0;
  rows->top = 0;
  rows->row_pixels = jpeg->output_width;
  /* Lossless files have no blocks to leave out: theirs is the only scan that does not end with coefficient 63. */
  int has_blocks = jpeg->progressive_mode || jpeg->Se == DCTSIZE2 - 1;
  if (!has_blocks || is_smoothed(jpeg))
    return FAULT_NONE;
  unsigned column = (unsigned)(jpeg->max_h_samp_factor * jpeg->min_DCT_scaled_size);
  unsigned row = (unsigned)(jpeg->max_v_samp_factor * jpeg->min_DCT_scaled_size);
  /* One more block on each side: colour is interpolated between its neighbours. */
  unsigned left = settings->left / column * column;
  left = left > column ? left - column : 0;
  unsigned right = (settings->right + column - 1) / column * column + column;
  right = right < rows->width ? right : rows->width;
  if (left > 0 || right < rows->width) {
    rows->left = left;
    rows->row_pixels = right - left;
    jpeg_crop_scanline(jpeg, &rows->left, &rows->row_pixels);
  }
  /* Only whole rows of blocks are left out, since the skip of part of one is not exact for every sampling. */
  rows->top = settings->top / row * row;
  if (rows->top > 0)
    jpeg_skip_scanlines(jpeg, rows->top);
  return FAULT_NONE;
}

/* Reads the next `count` rows, `pitch` bytes apart. */
int imagine_jpeg_read(struct imagine_jpeg *self, unsigned char *target, size_t pitch, unsigned count)
{
  struct jpeg_decompress_struct *jpeg = &self->jpeg;
  const unsigned first = jpeg->output_scanline, end = first + count;
  JSAMPROW rows[ROWS_AT_ONCE];
  if (setjmp(self->caller))
    return self->fault;
  while (jpeg->output_scanline < end) {
    unsigned rest = end - jpeg->output_scanline;
    unsigned wanted = rest < ROWS_AT_ONCE ? rest : ROWS_AT_ONCE;
    for (unsigned i = 0; i < wanted; i++)
      rows[i] = target + (jpeg->output_scanline - first + i) * pitch;
    if (jpeg_read_scanlines(jpeg, rows, wanted) == 0) /* never: a file in memory gives all its rows, or a fault */
      ERREXIT(jpeg, JERR_CANT_SUSPEND);
  }
  return FAULT_NONE;
}

/* After the last row: reads on to the end marker, so that a file cut behind its pixels is a fault too. */
int imagine_jpeg_finish(struct imagine_jpeg *self)
{
  if (setjmp(self->caller))
    return self->fault;
  jpeg_finish_decompress(&self->jpeg);
  return FAULT_NONE;
}
