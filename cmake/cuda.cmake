# The CUDA backends: whether to build them, from what, and for which cards.
set(FLEXPREFILL_CUDA AUTO CACHE STRING "Build the CUDA backends: ON, OFF, or AUTO: where nvcc is")
set_property(CACHE FLEXPREFILL_CUDA PROPERTY STRINGS AUTO ON OFF)
option(FLEXPREFILL_CUDA_EMULATOR
  "Build the CUDA backends for a device in software (tests/cuda_emulator), to test them" OFF)

# Every card from compute capability 8.0 on; the PTX is for cards that came later.
set(FLEXPREFILL_CUDA_ARCHITECTURES 80 86-real 89-real 90a-real CACHE STRING
  "Cards to compile for; fewer compile faster. The Hopper kernel is always compiled for 90a")
set(flexprefill_cuda_sources
  src/attend/attend_sm80.cu
  src/cuda/device_problem.cu)
# Cards of 8.6 and 8.9 run select's code for 8.0: compiled for them, it lacks a register. Always for
# 90a too: launch_overlapped counts on code for it.
set(flexprefill_select_sources
  src/cuda/device_index.cu
  src/select/block_means_cuda.cu
  src/select/select_blocks_cuda.cu
  src/select/select_cover_cuda.cu
  src/select/select_cuda.cu)
string(REGEX REPLACE "8[1-9]" "80" flexprefill_select_architectures
  "${FLEXPREFILL_CUDA_ARCHITECTURES}")
list(APPEND flexprefill_select_architectures 90a-real)
list(REMOVE_DUPLICATES flexprefill_select_architectures)
if("80" IN_LIST flexprefill_select_architectures)
  list(REMOVE_ITEM flexprefill_select_architectures 80-real)
endif()
# What needs wgmma and TMA.
set(flexprefill_sm90_architectures 90a-real)
set(flexprefill_sm90_sources
  src/attend/attend_sm90.cu
  src/attend/attend_sm90_d64.cu
  src/attend/attend_sm90_d128.cu
  src/attend/attend_sm90_d192.cu
  src/attend/attend_sm90_d256.cu
  src/select/probe_sm90.cu
  src/select/probe_sm90_d64.cu
  src/select/probe_sm90_d128.cu
  src/select/probe_sm90_d192.cu
  src/select/probe_sm90_d256.cu
  src/select/select_blocks_sm90.cu
  src/select/select_cover_sm90.cu
  src/select/select_cover_sm90_d64.cu
  src/select/select_cover_sm90_d128.cu
  src/select/select_cover_sm90_d192.cu
  src/select/select_cover_sm90_d256.cu)

# As on the host, a product and a sum of select round separately; where they may be fused, it says
# fmaf.
if(NOT FLEXPREFILL_CUDA_EMULATOR)
  set_source_files_properties(
    ${flexprefill_select_sources}
    src/select/probe_sm90.cu
    src/select/probe_sm90_d64.cu
    src/select/probe_sm90_d128.cu
    src/select/probe_sm90_d192.cu
    src/select/probe_sm90_d256.cu
    src/select/select_blocks_sm90.cu
    src/select/select_cover_sm90.cu
    src/select/select_cover_sm90_d64.cu
    src/select/select_cover_sm90_d128.cu
    src/select/select_cover_sm90_d192.cu
    src/select/select_cover_sm90_d256.cu
    PROPERTIES COMPILE_OPTIONS -fmad=false)
endif()

set(flexprefill_with_cuda OFF)
set(flexprefill_cudart CUDA::cudart_static)
if(FLEXPREFILL_CUDA_EMULATOR)
  set(flexprefill_with_cuda ON)
  set(flexprefill_cudart flexprefill_cuda_emulator)
  message(STATUS "CUDA backends: built for the emulator; for tests only")
elseif(NOT FLEXPREFILL_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80-real)  # each target sets its own
    endif()
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that of a newer nvcc
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    endif()
    find_package(CUDAToolkit REQUIRED)
    set(flexprefill_with_cuda ON)
    message(STATUS "CUDA backends: built with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  elseif(FLEXPREFILL_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA backends: not built, no nvcc found (FLEXPREFILL_CUDA=AUTO)")
  else()
    message(FATAL_ERROR "FLEXPREFILL_CUDA=ON: no CUDA compiler found; set CUDACXX to nvcc's path")
  endif()
else()
  message(STATUS "CUDA backends: not built (FLEXPREFILL_CUDA=OFF)")
endif()

# An object library of .cu files, its kernels without spills and local memory.
function(flexprefill_cuda_objects target architectures)
  add_library(${target} OBJECT ${ARGN})
  if(FLEXPREFILL_CUDA_EMULATOR)
    set_target_properties(${target} PROPERTIES
      POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
    flexprefill_emulate(${target} ${ARGN})
    return()
  endif()
  set_target_properties(${target} PROPERTIES
    POSITION_INDEPENDENT_CODE ON
    CUDA_ARCHITECTURES "${architectures}"
    CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(${target} PRIVATE include src)
  target_compile_options(${target} PRIVATE --expt-relaxed-constexpr
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage
    -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers,-ffp-contract=off
    "$<$<BOOL:${FLEXPREFILL_WERROR}>:SHELL:-Xptxas=-Werror -Werror=all-warnings>")
endfunction()
