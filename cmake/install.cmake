# Install rules: find_package(flexprefill) works from the install tree, shared and static.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flexprefill)

install(TARGETS flexprefill EXPORT flexprefill-targets)
install(DIRECTORY include/flexprefill TYPE INCLUDE)
install(EXPORT flexprefill-targets NAMESPACE flexprefill:: DESTINATION ${package_dir})

configure_package_config_file(cmake/flexprefill-config.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/flexprefill-config.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/flexprefill-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/flexprefill-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/flexprefill-config-version.cmake
  DESTINATION ${package_dir})
