/* A libnvidia-ml.so.1 for machines without a driver: the few functions that the probe asks, answering as the
   machine named by NVML_STUB would. Compiled with -DOLD_DRIVER it lacks what came after driver 450. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUCCESS 0
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define DRIVER_NOT_LOADED 9
#define GPU_IS_LOST 15
#define VERSION_MISMATCH 18
#define GIB (1ULL << 30)

typedef struct { int index; int instance; } device;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu, compute; } process;

typedef struct { unsigned int gpu, memory; } utilization;
typedef struct { unsigned int pid; unsigned long long at; unsigned int sm, memory, encoder, decoder; } share;

static device devices[2] = {{0, 0}, {1, 0}}, instances[2] = {{0, 1}, {0, 2}};
static const char *uuids[2] = {"GPU-11111111-aaaa-0000-0000-000000000000", "GPU-22222222-bbbb-0000-0000-000000000000"};
static const char *mig_uuids[2] = {"MIG-33333333-cccc-0000-0000-000000000000", "MIG-44444444-dddd-0000-0000-000000000000"};
static int calls, started;

static int is(const char *name) { const char *chosen = getenv("NVML_STUB"); return chosen && !strcmp(chosen, name); }
static int lost(void) { return is("lost") && calls > 1; }
static int copy(char *to, unsigned int size, const char *from) { strncpy(to, from, size); return SUCCESS; }
static int give(unsigned int *to, unsigned int value) { if (lost()) return GPU_IS_LOST; *to = value; return SUCCESS; }

int nvmlInitWithFlags(unsigned int flags) {
  if (is("unloaded")) return DRIVER_NOT_LOADED;
  if (is("mismatch")) return VERSION_MISMATCH;
  started++;
  return SUCCESS;
}
int nvmlShutdown(void) { started--; return SUCCESS; }
int nvmlStubStarted(void) { return started; }
const char *nvmlErrorString(int code) { return "stub error"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = is("none") ? 0 : is("two") || is("mixed") ? 2 : 1; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int at, device **out) {
  calls++;
  if (lost()) return GPU_IS_LOST;
  *out = &devices[at];
  return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device **out) {
  calls++;
  if (lost()) return GPU_IS_LOST;
  for (int at = 0; at < 2; at++) {
    if (!strcmp(uuid, uuids[at])) { *out = &devices[at]; return SUCCESS; }
    if (is("mig") && !strcmp(uuid, mig_uuids[at])) { *out = &instances[at]; return SUCCESS; }
  }
  return NOT_FOUND;
}
int nvmlDeviceGetIndex(device *gpu, unsigned int *out) { return give(out, gpu->index); }
int nvmlDeviceGetName(device *gpu, char *name, unsigned int size) {
  if (lost()) return GPU_IS_LOST;
  return copy(name, size, is("mig") ? "NVIDIA H100 80GB HBM3" : is("gb10") ? "NVIDIA GB10" : is("laptop") ? "NVIDIA GeForce RTX 3050 Laptop GPU" : is("mixed") && gpu->index ? "NVIDIA GeForce RTX 4090" : "NVIDIA GeForce RTX 3080");
}
int nvmlDeviceGetUUID(device *gpu, char *uuid, unsigned int size) {
  if (lost()) return GPU_IS_LOST;
  return copy(uuid, size, gpu->instance ? mig_uuids[gpu->instance - 1] : uuids[gpu->index]);
}
int nvmlDeviceGetMemoryInfo(device *gpu, memory *out) {
  if (lost()) return GPU_IS_LOST;
  if (is("gb10")) return NOT_SUPPORTED;
  unsigned long long total = gpu->instance ? 10 * GIB : is("mig") ? 80 * GIB : 10 * GIB;
  unsigned long long free = gpu->index ? 9 * GIB : 7 * GIB;
  memory answer = {total, free, total - free - 200};
  *out = answer;
  return SUCCESS;
}
static int list(unsigned int *count, process *out, const process *from, unsigned int size) {
  if (lost()) return GPU_IS_LOST;
  if (is("mig")) return NOT_SUPPORTED;
  if (!size) { *count = 0; return SUCCESS; }
  if (!out || *count < size) { *count = size; return INSUFFICIENT_SIZE; }
  memcpy(out, from, size * sizeof(process));
  *count = size;
  return SUCCESS;
}
static const process computing[2] = {{1, 2 * GIB, 0, 0}, {4194303, ~0ULL, 0, 0}}, drawing[2] = {{1, GIB, 0, 0}, {4194302, GIB / 2, 0, 0}};
int nvmlDeviceGetComputeRunningProcesses_v2(device *gpu, unsigned int *count, process *out) { return list(count, out, computing, 2); }
int nvmlDeviceGetGraphicsRunningProcesses_v2(device *gpu, unsigned int *count, process *out) { return list(count, out, drawing, 2); }
int nvmlSystemGetDriverVersion(char *version, unsigned int size) { return copy(version, size, "575.51.03"); }
int nvmlDeviceGetCudaComputeCapability(device *gpu, int *major, int *minor) { *major = 8; *minor = 6; return lost() ? GPU_IS_LOST : SUCCESS; }
/* A laptop's link rests at generation 1 and wakes up while it is watched, as it does in a copy. */
static int watched;
int nvmlDeviceGetCurrPcieLinkGeneration(device *gpu, unsigned int *out) { return is("gb10") ? NOT_SUPPORTED : give(out, is("laptop") && watched++ ? 4 : 1); }
int nvmlDeviceGetMaxPcieLinkGeneration(device *gpu, unsigned int *out) { return is("gb10") ? NOT_SUPPORTED : give(out, 4); }
int nvmlDeviceGetCurrPcieLinkWidth(device *gpu, unsigned int *out) { return is("gb10") ? NOT_SUPPORTED : give(out, is("laptop") ? 8 : 16); }
int nvmlDeviceGetMaxPcieLinkWidth(device *gpu, unsigned int *out) { return is("gb10") ? NOT_SUPPORTED : give(out, is("laptop") ? 8 : 16); }
int nvmlDeviceGetPowerManagementLimit(device *gpu, unsigned int *out) { return give(out, 320000); }
int nvmlDeviceGetClockInfo(device *gpu, int kind, unsigned int *out) { return give(out, 210); }
int nvmlDeviceGetMaxClockInfo(device *gpu, int kind, unsigned int *out) { return give(out, 2100); }
int nvmlDeviceGetCurrentClocksThrottleReasons(device *gpu, unsigned long long *out) { *out = 0x5; return lost() ? GPU_IS_LOST : SUCCESS; }
int nvmlDeviceGetUtilizationRates(device *gpu, utilization *out) { utilization answer = {37, 5}; *out = answer; return lost() ? GPU_IS_LOST : SUCCESS; }
int nvmlDeviceGetProcessUtilization(device *gpu, share *out, unsigned int *count, unsigned long long since) {
  /* In a container the numbers are the host's: none of them is the process that asks. */
  share shares[3] = {{is("container") ? 4194301 : getpid(), 1, 90, 0, 0, 0}, {4194302, 1, 20, 0, 0, 0}, {4194302, 2, 35, 0, 0, 0}};
  if (!out || *count < 3) { *count = 3; return INSUFFICIENT_SIZE; }
  memcpy(out, shares, sizeof(shares));
  *count = 3;
  return SUCCESS;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(device *gpu, unsigned int *count, process *out) { return list(count, out, computing, 2); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(device *gpu, unsigned int *count, process *out) { return list(count, out, drawing, 2); }
int nvmlDeviceGetEnforcedPowerLimit(device *gpu, unsigned int *out) { return give(out, 300000); }
int nvmlDeviceGetCurrentClocksEventReasons(device *gpu, unsigned long long *out) { *out = 0x21; return lost() ? GPU_IS_LOST : SUCCESS; }
int nvmlDeviceGetBAR1MemoryInfo(device *gpu, memory *out) { memory bar = {256 << 20, 250 << 20, 6 << 20}; *out = bar; return is("gb10") ? NOT_SUPPORTED : SUCCESS; }
int nvmlDeviceGetMigMode(device *gpu, unsigned int *now, unsigned int *pending) {
  if (!is("mig") || gpu->instance) return NOT_SUPPORTED;
  *now = *pending = 1;
  return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(device *gpu, unsigned int *out) { return give(out, 7); }
int nvmlDeviceGetMigDeviceHandleByIndex(device *gpu, unsigned int at, device **out) {
  if (at > 1) return NOT_FOUND;
  *out = &instances[at];
  return SUCCESS;
}
#endif
