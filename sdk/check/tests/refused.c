/* A library with a magic block of any kind, and no root: what loading must refuse before it uses anything. */
#include <stdint.h>

#ifndef WORD
#define WORD "BLKLORA"
#endif
#ifndef MAJOR
#define MAJOR 1
#endif
#ifndef MINOR
#define MINOR 0
#endif
#ifndef ABI_STABLE
#define ABI_STABLE "0.11.3"
#endif

struct magic {
    char word[8];
    uint32_t length, abi_major, abi_minor;
    char abi_stable[20], target[64], name[80];
};

static const struct magic magic = {
    WORD, sizeof(struct magic), MAJOR, MINOR, ABI_STABLE, TARGET, "merge-refused",
};

#ifndef NO_SYMBOL
const struct magic *blocklora_plugin_magic(void)
{
#ifdef NO_BLOCK
    return 0;
#else
    return &magic;
#endif
}
#else
const struct magic *something_else(void) { return &magic; }
#endif
