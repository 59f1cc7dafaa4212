# The warnings that every target of the project is compiled with.
function(flexprefill_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra
    $<$<COMPILE_LANGUAGE:CXX>:-Wshadow>
    $<$<COMPILE_LANGUAGE:C>:-Wpedantic>
    $<$<BOOL:${FLEXPREFILL_WERROR}>:-Werror>)
endfunction()
