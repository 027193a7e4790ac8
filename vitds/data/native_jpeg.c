/* A window of a JPEG through libjpeg-turbo's own interface, which decodes no more rows and columns than it needs.

   Pixels equal those of a whole decode (accurate DCT, smooth chroma) bit for bit. Smooth upsampling looks one chroma
   sample to each side, and at an edge it does something else; so the decoded region has a margin around the window
   wherever the image goes on. Whatever is unusual is declined and left to another decoder: four components, other than
   8 bits, anything that libjpeg-turbo warns about or fails on. Python's lock is released while decoding.

   Source: libjpeg-turbo's libjpeg.txt and jpeglib.h (jpeg_skip_scanlines, jpeg_crop_scanline). */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <jpeglib.h>
#include <jerror.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or later is needed: others decode no windows, or have other pixels in 4:4:0"
#endif
#define TEXT_OF(name) #name
#define VERSION_TEXT(name) TEXT_OF(name)

typedef struct {
    struct jpeg_error_mgr manager; /* first, so that a pointer to it points here */
    jmp_buf declined;
} Errors;

static void decline(j_common_ptr jpeg) { longjmp(((Errors *)jpeg->err)->declined, 1); }

static void decline_warning(j_common_ptr jpeg, int level)
{
    if (level < 0) /* corrupt data; the others are traces */
        decline(jpeg);
}

/* Up to so many bytes of junk follow the scan of images that are whole: two of ImageNet's have one. More are left over
   where damage made the scan's codes come to their end too soon. */
#define MAX_JUNK_BYTES 32

/* Is it a warning that leaves the pixels as they should be? */
static int is_harmless(const struct jpeg_error_mgr *manager)
{
    int marker = manager->msg_parm.i[1];

    switch (manager->msg_code) {
    case JWRN_EXTRANEOUS_DATA:
        return manager->msg_parm.i[0] <= MAX_JUNK_BYTES && (marker < JPEG_RST0 || marker > JPEG_RST0 + 7);
    case JWRN_JFIF_MAJOR:
    case JWRN_ADOBE_XFORM:
    case JWRN_NOT_SEQUENTIAL:
        return 1;
    default:
        return 0;
    }
}

static void decline_damage(j_common_ptr jpeg, int level)
{
    if (level < 0 && !is_harmless(jpeg->err))
        decline(jpeg);
}

static void print_nothing(j_common_ptr jpeg) { (void)jpeg; }

static void set_up(struct jpeg_decompress_struct *jpeg, Errors *errors)
{
    jpeg->err = jpeg_std_error(&errors->manager);
    errors->manager.error_exit = decline;
    errors->manager.emit_message = decline_warning;
    errors->manager.output_message = print_nothing;
}

/* Read the header; false for what is left to others. */
static int read_header(struct jpeg_decompress_struct *jpeg, const unsigned char *data, size_t num_bytes)
{
    jpeg_mem_src(jpeg, data, num_bytes);
    if (jpeg_read_header(jpeg, TRUE) != JPEG_HEADER_OK || jpeg->data_precision != 8)
        return 0;
    return jpeg->jpeg_color_space == JCS_GRAYSCALE || jpeg->jpeg_color_space == JCS_YCbCr ||
           jpeg->jpeg_color_space == JCS_RGB;
}

/* Height and width in pixels, and whether there is but one scan; false for what is declined. */
static int image_header(const unsigned char *data, size_t num_bytes, long *height, long *width, long *has_one_scan)
{
    struct jpeg_decompress_struct jpeg = {0}; /* so that destroying it is right at any point */
    Errors errors;
    volatile int understood = 0;

    set_up(&jpeg, &errors);
    if (setjmp(errors.declined)) {
        jpeg_destroy_decompress(&jpeg);
        return 0;
    }
    jpeg_create_decompress(&jpeg);
    understood = read_header(&jpeg, data, num_bytes);
    *height = jpeg.image_height;
    *width = jpeg.image_width;
    *has_one_scan = understood && !jpeg_has_multiple_scans(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return understood;
}

/* Does what is left of the file hold the mark of its end? A file that was cut off does not. */
static int has_end(const struct jpeg_decompress_struct *jpeg)
{
    const unsigned char *at = jpeg->src->next_input_byte, *end = at + jpeg->src->bytes_in_buffer;

    if (jpeg->unread_marker == JPEG_EOI) /* met already, beyond the last bits that were asked for */
        return 1;
    if (end - at >= 2 && end[-2] == 0xFF && end[-1] == JPEG_EOI)
        return 1;
    while (at < end && (at = memchr(at, 0xFF, end - at)) != NULL && ++at < end)
        if (*at == JPEG_EOI)
            return 1;
    return 0;
}

/* Fill pixels (height, width, 3) with the window; false when the image is declined or the window is not inside. */
static int decode_window(const unsigned char *data, size_t num_bytes, size_t top, size_t left, size_t height,
                         size_t width, unsigned char *pixels)
{
    struct jpeg_decompress_struct jpeg = {0}; /* so that destroying it is right at any point */
    Errors errors;
    JDIMENSION first_column, num_columns;
    JSAMPARRAY rows;
    size_t row, margin, bottom = top + height;

    set_up(&jpeg, &errors);
    if (setjmp(errors.declined)) {
        jpeg_destroy_decompress(&jpeg);
        return 0;
    }
    jpeg_create_decompress(&jpeg);
    if (!read_header(&jpeg, data, num_bytes) || !height || !width || bottom > jpeg.image_height ||
        left + width > jpeg.image_width)
        decline((j_common_ptr)&jpeg);
    jpeg.out_color_space = JCS_RGB;
    jpeg.dct_method = JDCT_ISLOW;
    jpeg.do_fancy_upsampling = TRUE;
    jpeg_start_decompress(&jpeg);

    margin = jpeg.max_h_samp_factor > 1 ? 2 : 0; /* a sample of chroma where it is halved */
    first_column = left > margin ? left - margin : 0;
    num_columns = (left + width + margin < jpeg.image_width ? left + width + margin : jpeg.image_width) - first_column;
    if (num_columns < jpeg.image_width)
        jpeg_crop_scanline(&jpeg, &first_column, &num_columns); /* moves the first column left to a whole block */
    if (top)
        jpeg_skip_scanlines(&jpeg, top);
    rows = (*jpeg.mem->alloc_sarray)((j_common_ptr)&jpeg, JPOOL_IMAGE, 3 * jpeg.output_width, 1);
    for (row = top; row < bottom; row++) {
        if (jpeg_read_scanlines(&jpeg, rows, 1) != 1)
            decline((j_common_ptr)&jpeg);
        memcpy(pixels + 3 * width * (row - top), rows[0] + 3 * (left - first_column), 3 * width);
    }
    if (jpeg.output_scanline == jpeg.output_height)
        jpeg_finish_decompress(&jpeg);
    else if (!jpeg_has_multiple_scans(&jpeg) && !has_end(&jpeg)) /* several scans were read to their end */
        decline((j_common_ptr)&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return 1;
}

/* Decode all of it; true, and what libjpeg says in words (JMSG_LENGTH_MAX), where that tells of damage. */
static int find_damage(const unsigned char *data, size_t num_bytes, char *words)
{
    struct jpeg_decompress_struct jpeg = {0}; /* so that destroying it is right at any point */
    Errors errors;
    JSAMPARRAY rows;

    set_up(&jpeg, &errors);
    errors.manager.emit_message = decline_damage;
    if (setjmp(errors.declined)) {
        (*errors.manager.format_message)((j_common_ptr)&jpeg, words);
        jpeg_destroy_decompress(&jpeg);
        return 1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, num_bytes);
    jpeg_read_header(&jpeg, TRUE);
    jpeg_start_decompress(&jpeg);
    rows = (*jpeg.mem->alloc_sarray)((j_common_ptr)&jpeg, JPOOL_IMAGE, jpeg.output_width * jpeg.output_components, 1);
    while (jpeg.output_scanline < jpeg.output_height)
        jpeg_read_scanlines(&jpeg, rows, 1);
    jpeg_finish_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return 0;
}

static PyObject *py_header(PyObject *module, PyObject *args)
{
    Py_buffer data;
    long height = 0, width = 0, has_one_scan = 0;
    int understood;

    if (!PyArg_ParseTuple(args, "y*:header", &data))
        return NULL;
    understood = image_header(data.buf, data.len, &height, &width, &has_one_scan);
    PyBuffer_Release(&data);
    if (!understood)
        return Py_BuildValue("OO", Py_None, Py_False);
    return Py_BuildValue("(ll)O", height, width, has_one_scan ? Py_True : Py_False);
}

static PyObject *py_read_window(PyObject *module, PyObject *args)
{
    Py_buffer data, pixels;
    Py_ssize_t top, left, height, width;
    int done;

    if (!PyArg_ParseTuple(args, "y*(nnnn)w*:read_window", &data, &top, &left, &height, &width, &pixels))
        return NULL;
    if (top < 0 || left < 0 || height < 1 || width < 1 || top > JPEG_MAX_DIMENSION || left > JPEG_MAX_DIMENSION ||
        height > JPEG_MAX_DIMENSION || width > JPEG_MAX_DIMENSION || pixels.len != 3 * height * width) {
        PyBuffer_Release(&data);
        PyBuffer_Release(&pixels);
        PyErr_SetString(PyExc_ValueError, "no window, or pixels of another size");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    done = decode_window(data.buf, data.len, top, left, height, width, pixels.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    PyBuffer_Release(&pixels);
    return PyBool_FromLong(done);
}

static PyObject *py_damage(PyObject *module, PyObject *args)
{
    Py_buffer data;
    char words[JMSG_LENGTH_MAX] = "";
    int is_damaged;

    if (!PyArg_ParseTuple(args, "y*:damage", &data))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    is_damaged = find_damage(data.buf, data.len, words);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    if (!is_damaged)
        Py_RETURN_NONE;
    return PyUnicode_FromString(words);
}

static PyMethodDef functions[] = {
    {"header", py_header, METH_VARARGS,
     "header(data) -> (height, width), or None for what this decoder declines; and whether it has a single scan."},
    {"read_window", py_read_window, METH_VARARGS,
     "read_window(data, (top, left, height, width), pixels_HWC) -> whether it was decoded; False: ask another decoder."},
    {"damage", py_damage, METH_VARARGS,
     "damage(data) -> libjpeg's words for what is damaged anywhere in a JPEG, or None when it is whole."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "native_jpeg", "Windows of JPEGs, decoded.", -1,
                                        functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_native_jpeg(void)
{
    PyObject *module = PyModule_Create(&definition);

    if (module != NULL)
        PyModule_AddStringConstant(module, "LIBRARY", "libjpeg-turbo " VERSION_TEXT(LIBJPEG_TURBO_VERSION));
    return module;
}
