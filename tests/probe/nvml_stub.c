/* A libnvidia-ml.so.1 for machines without a driver: the functions that the probe asks, answering as the machine
   named by NVML_STUB would. Compiled with -DOLD_DRIVER it lacks what came after driver 450.

   NVML_STUB_LOST_AFTER=N   after N calls every GPU has fallen off the bus
   NVML_STUB_TAKEN=N        bytes that another process has taken since
   NVML_STUB_LOG=FILE       a line for every start and every shutdown */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUCCESS 0
#define NO_PERMISSION 4
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define DRIVER_NOT_LOADED 9
#define GPU_IS_LOST 15
#define VERSION_MISMATCH 18
#define GIB (1ULL << 30)
#define MIB (1ULL << 20)

typedef struct { int index; int instance; } device;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu, compute; } process;
typedef struct { unsigned int gpu, memory; } utilization;
typedef struct { unsigned int pid; unsigned long long at; unsigned int sm, memory, encoder, decoder; } share;

/* Zero where the machine's driver says "not supported". */
typedef struct {
  const char *scenario, *name, *driver;
  int major, minor;
  unsigned long long total, free, bar;
  unsigned int generation, generation_max, width, width_max;
  unsigned int watts, default_watts, sm_clock, memory_clock, bus_bits;
} machine;

static const machine machines[] = {
  {"desktop", "NVIDIA GeForce RTX 3080", "575.51.03", 8, 6, 10 * GIB, 7 * GIB, 256 * MIB, 1, 4, 16, 16, 300, 320, 2100, 9501, 320},
  {"mig", "NVIDIA H100 80GB HBM3", "580.82.07", 9, 0, 80 * GIB, 60 * GIB, 128 * GIB, 5, 5, 16, 16, 700, 700, 1980, 2619, 5120},
  {"laptop", "NVIDIA GeForce RTX 3050 Laptop GPU", "575.51.03", 8, 6, 4 * GIB, 3 * GIB, 256 * MIB, 1, 4, 8, 8, 0, 0, 2100, 6001, 128},
  {"gb10", "NVIDIA GB10", "580.95.05", 12, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2418, 0, 0},
  {"mixed", "NVIDIA GeForce RTX 4090", "575.51.03", 8, 9, 24 * GIB, 9 * GIB, 256 * MIB, 4, 4, 16, 16, 450, 450, 3105, 10501, 384},
  {"bare", "A GPU that tells nothing", "575.51.03", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
};
/* An instance knows its memory; bus, clocks and power are the whole GPU's, and not told. */
static const machine slice = {"", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "580.82.07", 9, 0, 10 * GIB, 7 * GIB, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
static device devices[2] = {{0, 0}, {1, 0}}, instances[2] = {{0, 1}, {0, 2}};
static const char *uuids[2] = {"GPU-11111111-aaaa-0000-0000-000000000000", "GPU-22222222-bbbb-0000-0000-000000000000"};
static const char *mig_uuids[2] = {"MIG-33333333-cccc-0000-0000-000000000000", "MIG-44444444-dddd-0000-0000-000000000000"};
static int calls, handles, started, inside, overlapped;

static int is(const char *name) { const char *chosen = getenv("NVML_STUB"); return chosen && !strcmp(chosen, name); }
static int quiet(void) { return is("idle") || is("laptop"); }
static int lost(void) {
  const char *after = getenv("NVML_STUB_LOST_AFTER");
  return (after && calls > atoi(after)) || (is("lost") && handles > 1);
}
static const machine *of(device *gpu) {
  if (is("mixed") && !gpu->index) return &machines[0];
  if (gpu->instance) return &slice;
  for (int at = 0; at < sizeof(machines) / sizeof(*machines); at++)
    if (is(machines[at].scenario)) return &machines[at];
  return &machines[0];
}
static void note(const char *what) {
  const char *path = getenv("NVML_STUB_LOG");
  FILE *file = path ? fopen(path, "a") : 0;
  if (file) { fprintf(file, "%s\n", what); fclose(file); }
}
/* Every call takes a moment, so that two at once would be seen. */
static void call(void) {
  calls++;
  if (__sync_add_and_fetch(&inside, 1) > 1) overlapped = 1;
  if (getenv("NVML_STUB_SLOW")) usleep(200);
  __sync_sub_and_fetch(&inside, 1);
}
static int give(unsigned int *to, unsigned int value) {
  call();
  if (lost()) return GPU_IS_LOST;
  if (!value) return NOT_SUPPORTED;
  *to = value;
  return SUCCESS;
}
static int copy(char *to, unsigned int size, const char *from) {
  call();
  if (lost()) return GPU_IS_LOST;
  strncpy(to, from, size);
  return SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) {
  if (is("unloaded")) return DRIVER_NOT_LOADED;
  if (is("mismatch")) return VERSION_MISMATCH;
  if (is("forbidden")) return NO_PERMISSION;
  if (is("unknown")) return 999;
  note("start");
  started++;
  return SUCCESS;
}
int nvmlShutdown(void) { note("shutdown"); started--; return SUCCESS; }
int nvmlStubStarted(void) { return started; }
int nvmlStubOverlapped(void) { return overlapped; }
int nvmlStubCalls(void) { return calls; }
const char *nvmlErrorString(int code) { return "stub error"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { call(); *count = is("none") ? 0 : is("two") || is("mixed") ? 2 : 1; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int at, device **out) {
  call();
  handles++;
  if (lost()) return GPU_IS_LOST;
  *out = &devices[at];
  return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device **out) {
  call();
  handles++;
  if (lost()) return GPU_IS_LOST;
  for (int at = 0; at < (is("none") ? 0 : is("two") || is("mixed") ? 2 : 1); at++)
    if (!strcmp(uuid, uuids[at])) { *out = &devices[at]; return SUCCESS; }
  for (int at = 0; at < 2; at++)
    if (is("mig") && !strcmp(uuid, mig_uuids[at])) { *out = &instances[at]; return SUCCESS; }
  return NOT_FOUND;
}
int nvmlDeviceGetIndex(device *gpu, unsigned int *out) { call(); *out = gpu->index; return lost() ? GPU_IS_LOST : SUCCESS; }
int nvmlDeviceGetName(device *gpu, char *name, unsigned int size) { return copy(name, size, of(gpu)->name); }
int nvmlDeviceGetUUID(device *gpu, char *uuid, unsigned int size) {
  return copy(uuid, size, gpu->instance ? mig_uuids[gpu->instance - 1] : uuids[gpu->index]);
}
int nvmlDeviceGetMemoryInfo(device *gpu, memory *out) {
  unsigned long long total = of(gpu)->total, free = gpu->index ? 9 * GIB : of(gpu)->free;
  const char *taken = getenv("NVML_STUB_TAKEN");
  if (taken) free -= strtoull(taken, 0, 10);
  call();
  if (lost()) return GPU_IS_LOST;
  if (!total) return NOT_SUPPORTED;
  memory answer = {total, free, total - free - 200 * MIB}; /* newer drivers count their own share apart */
  *out = answer;
  return SUCCESS;
}
static int list(unsigned int *count, process *out, const process *from, unsigned int size) {
  call();
  if (lost()) return GPU_IS_LOST;
  if (is("mig") || is("bare")) return NOT_SUPPORTED;
  if (quiet()) size = 0;
  if (!size) { *count = 0; return SUCCESS; }
  if (!out || *count < size) { *count = size; return INSUFFICIENT_SIZE; }
  memcpy(out, from, size * sizeof(process));
  *count = size;
  return SUCCESS;
}
static const process computing[2] = {{1, 2 * GIB, 0, 0}, {4194303, ~0ULL, 0, 0}}, drawing[2] = {{1, GIB, 0, 0}, {4194302, GIB / 2, 0, 0}};
int nvmlDeviceGetComputeRunningProcesses_v2(device *gpu, unsigned int *count, process *out) { return list(count, out, computing, 2); }
int nvmlDeviceGetGraphicsRunningProcesses_v2(device *gpu, unsigned int *count, process *out) { return list(count, out, drawing, 2); }
int nvmlSystemGetDriverVersion(char *version, unsigned int size) { return copy(version, size, of(devices)->driver); }
int nvmlDeviceGetCudaComputeCapability(device *gpu, int *major, int *minor) {
  call();
  *major = of(gpu)->major;
  *minor = of(gpu)->minor;
  return lost() ? GPU_IS_LOST : *major ? SUCCESS : NOT_SUPPORTED;
}
/* A laptop's link rests at generation 1 and wakes up while it is watched, as it does in a copy. */
static int watched;
int nvmlDeviceGetCurrPcieLinkGeneration(device *gpu, unsigned int *out) { return give(out, is("laptop") && watched++ ? 4 : of(gpu)->generation); }
int nvmlDeviceGetMaxPcieLinkGeneration(device *gpu, unsigned int *out) { return give(out, of(gpu)->generation_max); }
int nvmlDeviceGetCurrPcieLinkWidth(device *gpu, unsigned int *out) { return give(out, of(gpu)->width); }
int nvmlDeviceGetMaxPcieLinkWidth(device *gpu, unsigned int *out) { return give(out, of(gpu)->width_max); }
int nvmlDeviceGetPowerManagementLimit(device *gpu, unsigned int *out) { return give(out, of(gpu)->default_watts * 1000); }
int nvmlDeviceGetPowerManagementDefaultLimit(device *gpu, unsigned int *out) { return give(out, of(gpu)->default_watts * 1000); }
int nvmlDeviceGetClockInfo(device *gpu, int kind, unsigned int *out) { return give(out, of(gpu)->sm_clock ? 210 : 0); }
int nvmlDeviceGetMaxClockInfo(device *gpu, int kind, unsigned int *out) { return give(out, kind == 2 ? of(gpu)->memory_clock : of(gpu)->sm_clock); }
static int reasons(unsigned long long *out, unsigned long long bits) {
  call();
  *out = quiet() ? 1 : bits;
  return lost() ? GPU_IS_LOST : is("bare") ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(device *gpu, unsigned long long *out) { return reasons(out, 0x5); }
int nvmlDeviceGetUtilizationRates(device *gpu, utilization *out) {
  call();
  utilization answer = {quiet() ? 0 : 37, 5};
  *out = answer;
  return lost() ? GPU_IS_LOST : is("bare") ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetProcessUtilization(device *gpu, share *out, unsigned int *count, unsigned long long since) {
  /* In a container the numbers are the host's: none of them is the process that asks. */
  share shares[3] = {{is("container") ? 4194301 : getpid(), 1, 90, 0, 0, 0}, {4194302, 1, quiet() ? 0 : 20, 0, 0, 0}, {4194302, 2, quiet() ? 0 : 35, 0, 0, 0}};
  call();
  if (lost()) return GPU_IS_LOST;
  if (is("bare")) return NOT_SUPPORTED;
  if (!out || *count < 3) { *count = 3; return INSUFFICIENT_SIZE; }
  memcpy(out, shares, sizeof(shares));
  *count = 3;
  return SUCCESS;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(device *gpu, unsigned int *count, process *out) { return list(count, out, computing, 2); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(device *gpu, unsigned int *count, process *out) { return list(count, out, drawing, 2); }
int nvmlDeviceGetEnforcedPowerLimit(device *gpu, unsigned int *out) { return give(out, of(gpu)->watts * 1000); }
int nvmlDeviceGetCurrentClocksEventReasons(device *gpu, unsigned long long *out) { return reasons(out, 0x21); }
int nvmlDeviceGetMemoryBusWidth(device *gpu, unsigned int *out) { return give(out, of(gpu)->bus_bits); }
int nvmlDeviceGetBAR1MemoryInfo(device *gpu, memory *out) {
  call();
  memory bar = {of(gpu)->bar, of(gpu)->bar, 0};
  *out = bar;
  return lost() ? GPU_IS_LOST : bar.total ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetMigMode(device *gpu, unsigned int *now, unsigned int *pending) {
  call();
  if (!is("mig") || gpu->instance) return NOT_SUPPORTED;
  *now = *pending = 1;
  return lost() ? GPU_IS_LOST : SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(device *gpu, unsigned int *out) { return give(out, 7); }
int nvmlDeviceGetMigDeviceHandleByIndex(device *gpu, unsigned int at, device **out) {
  call();
  if (at > 1) return NOT_FOUND;
  *out = &instances[at];
  return lost() ? GPU_IS_LOST : SUCCESS;
}
#endif
