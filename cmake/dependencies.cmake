# Every dependency is found first and fetched at a pinned version otherwise.
include(FetchContent)

# An option of a fetched project. In the cache: older projects overwrite plain variables.
macro(flexprefill_fetched_option name value)
  set(${name} ${value} CACHE BOOL "Set by flexprefill" FORCE)
endmacro()

# Highway: vector code for every instruction set from one source, chosen at run time.
find_package(hwy 1.0.3 CONFIG QUIET)
if(NOT hwy_FOUND)
  message(STATUS "Highway not found (Debian: libhwy-dev): fetching 1.2.0")
  flexprefill_fetched_option(HWY_ENABLE_TESTS OFF)
  flexprefill_fetched_option(HWY_ENABLE_EXAMPLES OFF)
  flexprefill_fetched_option(HWY_ENABLE_CONTRIB OFF)
  flexprefill_fetched_option(HWY_FORCE_STATIC_LIBS ON)
  FetchContent_Declare(highway URL
    https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz)
  FetchContent_MakeAvailable(highway)
  set_target_properties(hwy PROPERTIES POSITION_INDEPENDENT_CODE ON)
  if(NOT TARGET hwy::hwy)
    add_library(hwy::hwy ALIAS hwy)
  endif()
endif()

# oneTBB: the thread pool. It shares a process with OpenMP and with other users of TBB.
find_package(TBB 2021.8 CONFIG QUIET)
if(NOT TBB_FOUND)
  message(STATUS "oneTBB not found (Debian: libtbb-dev; PyPI: tbb-devel): fetching 2021.13.0")
  flexprefill_fetched_option(TBB_TEST OFF)
  flexprefill_fetched_option(TBB_STRICT OFF)  # its warnings are not errors here
  FetchContent_Declare(tbb URL
    https://github.com/oneapi-src/oneTBB/archive/refs/tags/v2021.13.0.tar.gz)
  FetchContent_MakeAvailable(tbb)
endif()

# GoogleTest: the C++ tests, only where they are built.
macro(flexprefill_find_googletest)
  find_package(GTest 1.12 CONFIG QUIET)
  if(NOT GTest_FOUND)
    message(STATUS "GoogleTest not found (Debian: libgtest-dev): fetching 1.15.2")
    flexprefill_fetched_option(INSTALL_GTEST OFF)
    FetchContent_Declare(googletest URL
      https://github.com/google/googletest/archive/refs/tags/v1.15.2.tar.gz)
    FetchContent_MakeAvailable(googletest)
  endif()
endmacro()
