// Package strictcbor encodes and decodes saved state: a machine's description,
// a device's state. What it decodes may come from an untrusted peer.
//
// Decoding refuses duplicate keys, unknown fields, items of indefinite length,
// tags, invalid UTF-8, data after the first item, and more than 12 nested
// levels, 4096 elements in an array or 64 pairs in a map. The length of a byte
// string is limited only by the input. A field that is missing keeps the value
// it has in the destination.
package strictcbor

import "github.com/fxamacker/cbor/v2"

// Limits on decoded data.
const (
	maxNested = 12
	maxArray  = 4096
	maxPairs  = 64
)

var (
	encoder      = must(cbor.CoreDetEncOptions().EncMode())
	decoder      = must(options(cbor.ExtraDecErrorUnknownField).DecMode())
	knownDecoder = must(options(cbor.ExtraDecErrorNone).DecMode())
)

func options(extra cbor.ExtraDecErrorCond) cbor.DecOptions {
	return cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		MaxNestedLevels:   maxNested,
		MaxArrayElements:  maxArray,
		MaxMapPairs:       maxPairs,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		UTF8:              cbor.UTF8RejectInvalid,
		ExtraReturnErrors: extra,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
	}
}

// must is for modes with constant options, which cannot fail.
func must[M any](m M, err error) M {
	if err != nil {
		panic(err)
	}
	return m
}

// Marshal encodes v. Equal values have equal encodings (RFC 8949, section
// 4.2.1).
func Marshal(v any) ([]byte, error) { return encoder.Marshal(v) }

// Unmarshal decodes b into the value that v points to. A field of b that v does
// not have is an error.
func Unmarshal(b []byte, v any) error { return decoder.Unmarshal(b, v) }

// UnmarshalKnown is [Unmarshal], except that fields of b that v does not have
// are ignored. It reads a version or a list of features before the rest is
// decoded.
func UnmarshalKnown(b []byte, v any) error { return knownDecoder.Unmarshal(b, v) }
