// Package supported makes a build for another system than Linux on x86-64 fail with one
// line that says so. A package that would fail to build there imports it.
package supported
