/* Stands in for pyxis: takes its options of srun and hands their values to the task, in its environment.
 *
 *   gcc -shared -fPIC -o stand_in_pyxis.so stand_in_pyxis.c
 *
 * Where an option is given twice it fails, as pyxis does. It starts no container.
 */
#include <slurm/spank.h>
#include <stddef.h>

SPANK_PLUGIN(stand_in_pyxis, 1)

enum { IMAGE, MOUNTS, WORKDIR, OPTIONS };
static const char *variables[OPTIONS] = {"PYXIS_IMAGE", "PYXIS_MOUNTS", "PYXIS_WORKDIR"};
static char values[OPTIONS][4096];

static int take(int option, const char *value, int remote)
{
    (void)remote;
    if (values[option][0] != '\0' || value == NULL) {
        slurm_error("stand_in_pyxis: %s given twice, or without a value", variables[option]);
        return -1;
    }
    size_t i;
    for (i = 0; value[i] != '\0' && i < sizeof values[option] - 1; i++)
        values[option][i] = value[i];
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "an image, as enroot takes it", 1, IMAGE, take},
    {"container-mounts", "SOURCE:TARGET", "mounts, with commas", 1, MOUNTS, take},
    {"container-workdir", "PATH", "working directory", 1, WORKDIR, take},
    SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    for (int i = 0; i < OPTIONS; i++)
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
            return -1;
    return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    for (int i = 0; i < OPTIONS; i++)
        if (values[i][0] != '\0' && spank_setenv(spank, variables[i], values[i], 1) != ESPANK_SUCCESS)
            return -1;
    return 0;
}
