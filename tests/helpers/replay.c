/* One call of the compiled loops in another machine's memory, given by a file and answered there.
 *
 * The file: the function's name (64 bytes), 24 integers, 8 doubles, the number of regions, and for
 * each its address, its length and its bytes. The regions are put at their addresses, the function
 * is called, and their bytes are written back. Integers go by registers and then the stack, doubles
 * by registers of their own, whatever their order: so on aarch64. */

#include "loops.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { PAGE = 1 << 16 };

typedef void function(idx, idx, idx, idx, idx, idx, idx, idx, idx, idx, idx, idx, idx, idx, idx, idx,
                      idx, idx, idx, idx, idx, idx, idx, idx, double, double, double, double, double,
                      double, double, double);

static const struct {
    const char *name;
    void *function;
} functions[] = {
    {"statistics", statistics},
    {"bn_relu", bn_relu},
    {"finish_gradient", finish_gradient},
    {"bn_relu_backward_apply", bn_relu_backward_apply},
    {"bn_relu_backward_reduce", bn_relu_backward_reduce},
    {"bn_relu_pool", bn_relu_pool},
    {"bn_relu_pool_backward", bn_relu_pool_backward},
    {"bn_relu_conv1x1", bn_relu_conv1x1},
    {"bn_relu_conv1x1_backward", bn_relu_conv1x1_backward},
    {"bn_relu_conv3", bn_relu_conv3},
    {"bn_relu_conv3_backward", bn_relu_conv3_backward},
    {"dropout_mask", dropout_mask},
};

static void fail(const char *why) {
    fprintf(stderr, "replay: %s\n", why);
    exit(1);
}

/* Whether two regions share this page; it is there after this. */
static int is_there(idx page) {
    static idx pages[1 << 16], count;
    for (idx i = 0; i < count; i++)
        if (pages[i] == page)
            return 1;
    if (count == sizeof pages / sizeof *pages)
        fail("too much memory");
    pages[count++] = page;
    return 0;
}

static void get(void *to, size_t size, FILE *file) {
    if (size != 0 && fread(to, size, 1, file) != 1)
        fail("the file is short");
}

int main(int count, char **words) {
    FILE *file = count == 2 ? fopen(words[1], "r+b") : NULL;
    if (file == NULL)
        fail("expected the file of a call");
    char name[64];
    idx n[24], regions, region[2];
    double d[8];
    get(name, sizeof name, file);
    get(n, sizeof n, file);
    get(d, sizeof d, file);
    get(&regions, sizeof regions, file);
    const long start = ftell(file);
    for (idx i = 0; i < regions; i++) {
        get(region, sizeof region, file);
        const idx first = region[0] / PAGE * PAGE, size = region[0] + region[1] - first;
        for (idx page = first; page < first + size; page += PAGE) {
            if (is_there(page))
                continue;
            if (mmap((void *)page, PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != (void *)page)
                fail("there is no memory where a region belongs");
        }
        get((void *)region[0], region[1], file);
    }
    void *called = NULL;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (strcmp(functions[i].name, name) == 0)
            called = functions[i].function;
    if (called == NULL)
        fail(name);
    ((function *)called)(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11],
                         n[12], n[13], n[14], n[15], n[16], n[17], n[18], n[19], n[20], n[21],
                         n[22], n[23], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]);
    fseek(file, start, SEEK_SET);
    for (idx i = 0; i < regions; i++) {
        get(region, sizeof region, file);
        fseek(file, 0, SEEK_CUR);
        if (region[1] != 0 && fwrite((void *)region[0], region[1], 1, file) != 1)
            fail("the file cannot be written");
        fseek(file, 0, SEEK_CUR);
    }
    return fclose(file) != 0;
}
