# The warnings that every target of the project is compiled with.
function(flexprefill_warnings target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra>
    "$<$<COMPILE_LANGUAGE:CXX>:-Wshadow;-Wno-missing-field-initializers>"
    $<$<COMPILE_LANGUAGE:C>:-Wpedantic>
    $<$<BOOL:${FLEXPREFILL_WERROR}>:-Werror>)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # Wrong in g++ 12 for "text" + std::to_string(n): gcc.gnu.org/PR105651.
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
  endif()
endfunction()
